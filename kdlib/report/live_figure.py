"""Overview figure of a running distillation, for the live panel. A null value leaves a gap."""

import itertools

from kdlib.report.style import (
    COLOURS,
    NAMES,
    PART_COLOURS,
    PART_NAMES,
    PARTS,
    THEMES,
    known,
    number,
    numbers,
    placed,
    sheet,
    smooth,
    time_unit,
    zoom,
)

SIZE, DPI = (13.0, 6.4), 80
MAX_POINTS = 400
"""Points per line: more are not visible and take time to draw."""
GIB = 2**30


def live_figure(records, theme="light"):
    """Plots loss terms, their shares of loss and gradient, learning curves, memory and learning rate.

    `records`: all or some of a run's records. An empty panel says when its data will exist.
    """
    margins = {"left": 0.045, "right": 0.985, "top": 0.88, "bottom": 0.075, "wspace": 0.18, "hspace": 0.5}
    ink = THEMES[theme]["text"]
    records = placed(records)
    trained = [r for r in records if r["kind"] == "train"]
    rows = [r for r in trained if r["run"] == "distilled"]
    rows = [r for r in rows if r["repeat"] == rows[-1]["repeat"]]
    with sheet(theme, SIZE, 2, 3, DPI, **margins) as (picture, ((loss, shares, gradient), (curves, memory, rate))):
        _plot_loss(loss, shares, _thin([r for r in rows if r["loss"] is not None and not r["skipped"]]))
        _plot_gradient(gradient, _thin([r for r in rows if r["grad_shares"]]))
        _plot_evaluations(curves, [r for r in records if r["kind"] == "eval" and r["split"] == "validation"], ink)
        _plot_memory(memory, trained, ink)
        _plot_learning_rate(rate, rows, [r for r in trained if r["run"] == "ce_only"], ink)
        names = [name for name in PARTS if any(name in r["shares"] for r in rows)]
        patches = [loss.fill_between([], [], color=_colour(name), label=PART_NAMES[name]) for name in names]
        place = {"loc": "upper left", "bbox_to_anchor": (0.04, 1.0)}
        picture.legend(handles=patches, ncols=len(PARTS), frameon=False, labelcolor=ink, **place)
    return picture


def _plot_loss(above, below, rows):
    _set_labels(above, "Loss of the distilled student", "optimizer step", "weighted parts (nats)")
    _set_labels(below, "Share of the loss", "optimizer step", "share (%)")
    below.set_ylim(0, 100)
    if len(rows) < 2:
        _clear(above, "after two steps")
        _clear(below, "after two steps")
        return
    steps = [r["step"] for r in rows]
    names = [name for name in PARTS if any(name in r["shares"] for r in rows)]
    shares = [smooth([r["shares"].get(name, 0.0) for r in rows]) for name in names]
    added = [smooth([number(r["shares"].get(name, 0.0)) * r["loss"] for r in rows]) for name in names]
    colours = [_colour(name) for name in names]
    above.stackplot(steps, added, colors=colours, alpha=0.9, lw=0)
    below.stackplot(steps, [[100 * x for x in line] for line in shares], colors=colours, alpha=0.9, lw=0)
    totals = sorted(known(map(sum, zip(*added, strict=True)))) or [0.0]
    above.set_ylim(0, max(1.15 * totals[int(0.98 * (len(totals) - 1))], 1e-6))  # ignores outliers
    for axes in (above, below):
        axes.set_xlim(steps[0], steps[-1])


def _plot_gradient(axes, rows):
    _set_labels(axes, "Share of the gradient norm", "optimizer step", "share (%)")
    axes.set_ylim(0, 100)
    if not rows:
        _clear(axes, "not measured yet")
        return
    _from_zero(axes, [r["step"] for r in rows])
    for name in PARTS:
        points = [(r["step"], 100 * number(r["grad_shares"][name])) for r in rows if name in r["grad_shares"]]
        if points:
            dots = {"marker": "o", "ms": 2.5} if len(points) < 50 else {}
            axes.plot(*zip(*points, strict=True), color=_colour(name), lw=1.6, **dots)


def _plot_evaluations(axes, points, ink):
    unit, seconds = time_unit([r["elapsed_s"] for r in points])
    dotted = "; dotted: averaged" if any(r.get("averaged") for r in points) else ""
    _set_labels(axes, f"Validation text (lower is better{dotted})", f"training time ({unit})", "bits per byte")
    runs = {(r["run"], r["repeat"], r.get("averaged", False)) for r in points if r["run"] != "teacher"}
    for run, repeat, averaged in sorted(runs):
        line = [r for r in points if (r["run"], r["repeat"], r.get("averaged", False)) == (run, repeat, averaged)]
        style = {"color": COLOURS[run], "lw": 1.6, "ms": 3.5, "alpha": 0.9}
        label = None if repeat or averaged else NAMES[run]
        axes.plot(*_over_time(line, seconds), ":" if averaged else "-", marker="o", label=label, **style)
    for level in known(r["bits_per_byte"] for r in points if r["run"] == "teacher")[:1]:
        axes.axhline(level, color=COLOURS["teacher"], ls="--", lw=1.4, label=NAMES["teacher"])
    _from_zero(axes, [r["elapsed_s"] / seconds for r in points])
    zoom(axes, [r["bits_per_byte"] for r in points if r["step"] or r["run"] == "teacher"])
    _legend(axes, ink, "" if runs else "after the first evaluation")


def _plot_memory(axes, rows, ink):
    seconds_of = _wall_clock(rows)
    rows = _thin([r for r in rows if known([r["memory"]["used_bytes"]])])
    unit, seconds = time_unit([seconds_of(r) for r in rows])
    _set_labels(axes, "Memory", f"training time of all students ({unit})", "GiB")
    if rows:
        last = {name: size / GIB for name, size in rows[-1]["memory"].items() if known([size])}
        xs = [seconds_of(r) / seconds for r in rows]
        used = [r["memory"]["used_bytes"] / GIB for r in rows]
        axes.plot(xs, used, color=PART_COLOURS[0], lw=1.8, label=f"used {used[-1]:.1f}")
        if last.get("predicted_bytes"):
            predicted = numbers((r["memory"].get("predicted_bytes") for r in rows), 1 / GIB)
            label = f"predicted peak {last['predicted_bytes']:.1f}"
            axes.plot(xs, predicted, "--", color=PART_COLOURS[5], lw=1.4, label=label)
        if "total_bytes" in last:
            axes.axhline(last["total_bytes"], color=ink, ls=":", lw=1.4, label=f"total {last['total_bytes']:.1f}")
        axes.set_ylim(0, 1.08 * max(last.values()))
        _from_zero(axes, xs)
    _legend(axes, ink, "" if rows else "after the first step")


def _plot_learning_rate(axes, distilled, control, ink):
    _set_labels(axes, "Learning rate", "optimizer step", "rate (1e-3)")
    for run, rows in (("ce_only", _thin(control)), ("distilled", _thin(distilled))):
        if rows:
            rates = numbers((r["lr"] for r in rows), 1000)
            axes.plot([r["step"] for r in rows], rates, color=COLOURS[run], lw=1.6, label=NAMES[run])
    axes.set_ylim(bottom=0)
    _from_zero(axes, [r["step"] for r in distilled + control])
    _legend(axes, ink, "" if distilled or control else "after the first step")


def _wall_clock(trained):
    """Returns a function from a record to its time on the training clocks of all students in sequence."""
    durations = {(r["run"], r["repeat"]): r["elapsed_s"] for r in trained}
    starts = dict(zip(durations, itertools.accumulate(durations.values(), initial=0), strict=False))
    return lambda r: starts[r["run"], r["repeat"]] + r["elapsed_s"]


def _legend(axes, ink, empty):
    """Adds a legend between title and axes, or the text `empty` to empty axes."""
    if empty:
        _clear(axes, empty)
    else:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.97), "ncols": 5, "borderaxespad": 0.3}
        axes.legend(frameon=False, labelcolor=ink, handlelength=1.3, columnspacing=1.0, **place)
        axes.set_title(axes.get_title(loc="left"), loc="left", y=1.0, pad=20)


def _set_labels(axes, title, xlabel, ylabel):
    """Sets title and labels at fixed positions, because matplotlib's layout is slow."""
    axes.set_title(title, loc="left", y=1.0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_label_coords(0.5, -0.12)
    axes.yaxis.set_label_coords(-0.095, 0.5)
    axes.locator_params(nbins=5)


def _clear(axes, message):
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center", alpha=0.6)
    axes.set_xticks([])
    axes.set_yticks([])


def _from_zero(axes, xs):
    longest = max(xs, default=0.0)
    axes.set_xlim(0, 1.03 * longest or 1.0)
    for line in axes.get_lines():
        if len(line.get_xdata()) == 1:  # a single point has no line
            line.set_marker("o")


def _over_time(rows, seconds):
    return [r["elapsed_s"] / seconds for r in rows], numbers(r["bits_per_byte"] for r in rows)


def _colour(name):
    return PART_COLOURS[PARTS.index(name)]


def _thin(rows):
    """Returns at most `MAX_POINTS` evenly spaced rows, including the last one."""
    stride = -(-len(rows) // MAX_POINTS) or 1
    return rows[(len(rows) - 1) % stride :: stride]
