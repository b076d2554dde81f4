"""Records -> one sheet of everything to watch while a run is under way. A number that is null leaves a gap."""

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
MOST_POINTS = 400
"""Points of a line: more can't be seen, and take time to draw."""
GIB = 2**30


def live_figure(records, theme="light"):
    """Parts of the loss, their shares of it and of the gradient; learning curves, memory, learning rate. `records` are those
    of a run, or some of them; what was not measured yet is said so.
    """
    margins = {"left": 0.045, "right": 0.985, "top": 0.88, "bottom": 0.075, "wspace": 0.18, "hspace": 0.5}
    ink = THEMES[theme]["text"]
    records = placed(records)
    trained = [r for r in records if r["kind"] == "train"]
    rows = [r for r in trained if r["run"] == "distilled"]
    rows = [r for r in rows if r["repeat"] == rows[-1]["repeat"]]
    with sheet(theme, SIZE, 2, 3, DPI, **margins) as (made, ((loss, shares, gradient), (curves, memory, rate))):
        _parts_of_the_loss(loss, shares, _thinned([r for r in rows if r["loss"] is not None and not r["skipped"]]))
        _shares_of_the_gradient(gradient, _thinned([r for r in rows if r["grad_shares"]]))
        _learning(curves, [r for r in records if r["kind"] == "eval" and r["split"] == "validation"], ink)
        _memory(memory, trained, ink)
        _learning_rate(rate, rows, [r for r in trained if r["run"] == "ce_only"], ink)
        seen = [n for n in PARTS if any(n in r["shares"] for r in rows)]
        patches = [loss.fill_between([], [], color=_colour(name), label=PART_NAMES[name]) for name in seen]
        place = {"loc": "upper left", "bbox_to_anchor": (0.04, 1.0)}
        made.legend(handles=patches, ncols=len(PARTS), frameon=False, labelcolor=ink, **place)
    return made


def _parts_of_the_loss(above, below, rows):
    _name(above, "Loss of the distilled student", "optimizer step", "weighted parts (nats)")
    _name(below, "Share of the loss", "optimizer step", "share (%)")
    below.set_ylim(0, 100)
    if len(rows) < 2:
        _nothing(above, "after two steps")
        _nothing(below, "after two steps")
        return
    steps = [r["step"] for r in rows]
    names = [name for name in PARTS if any(name in r["shares"] for r in rows)]
    shares = [smooth([r["shares"].get(name, 0.0) for r in rows]) for name in names]
    added = [smooth([number(r["shares"].get(name, 0.0)) * r["loss"] for r in rows]) for name in names]
    colours = [_colour(name) for name in names]
    above.stackplot(steps, added, colors=colours, alpha=0.9, lw=0)
    below.stackplot(steps, [[100 * x for x in line] for line in shares], colors=colours, alpha=0.9, lw=0)
    totals = sorted(known(map(sum, zip(*added, strict=True)))) or [0.0]
    above.set_ylim(0, max(1.15 * totals[int(0.98 * (len(totals) - 1))], 1e-6))  # not by one step that leapt
    for axes in (above, below):
        axes.set_xlim(steps[0], steps[-1])


def _shares_of_the_gradient(axes, rows):
    _name(axes, "Share of the gradient, which competes", "optimizer step", "share (%)")
    axes.set_ylim(0, 100)
    if not rows:
        _nothing(axes, "not measured yet")
        return
    _from_zero(axes, [r["step"] for r in rows])
    for name in PARTS:
        points = [(r["step"], 100 * number(r["grad_shares"][name])) for r in rows if name in r["grad_shares"]]
        if points:
            dots = {"marker": "o", "ms": 2.5} if len(points) < 50 else {}
            axes.plot(*zip(*points, strict=True), color=_colour(name), lw=1.6, **dots)


def _learning(axes, points, ink):
    unit, seconds = time_unit([r["elapsed_s"] for r in points])
    dotted = "; dotted: averaged" if any(r.get("averaged") for r in points) else ""
    _name(axes, f"Validation text (lower is better{dotted})", f"training time ({unit})", "bits per byte")
    runs = {(r["run"], r["repeat"], r.get("averaged", False)) for r in points if r["run"] != "teacher"}
    for run, repeat, averaged in sorted(runs):
        line = [r for r in points if (r["run"], r["repeat"], r.get("averaged", False)) == (run, repeat, averaged)]
        how = {"color": COLOURS[run], "lw": 1.6, "ms": 3.5, "alpha": 0.9}
        label = None if repeat or averaged else NAMES[run]
        kept, looks = ([r for r in line if bool(r.get("asked")) == asked] for asked in (False, True))
        axes.plot(*_over_time(kept, seconds), ":" if averaged else "-", marker="o", label=label, **how)
        axes.plot(*_over_time(looks, seconds), "o", mfc="none", **how)
    for level in known(r["bits_per_byte"] for r in points if r["run"] == "teacher")[:1]:
        axes.axhline(level, color=COLOURS["teacher"], ls="--", lw=1.4, label=NAMES["teacher"])
    _from_zero(axes, [r["elapsed_s"] / seconds for r in points])
    zoom(axes, [r["bits_per_byte"] for r in points if r["step"] or r["run"] == "teacher"])
    _legend(axes, ink, "" if runs else "after the first evaluation")


def _memory(axes, rows, ink):
    seconds_of = _wall_clock(rows)
    rows = _thinned([r for r in rows if known([r["memory"]["used_bytes"]])])
    unit, seconds = time_unit([seconds_of(r) for r in rows])
    _name(axes, "Memory", f"training time of all students ({unit})", "GiB")
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
            axes.axhline(last["total_bytes"], color=ink, ls=":", lw=1.4, label=f"there are {last['total_bytes']:.1f}")
        axes.set_ylim(0, 1.08 * max(last.values()))
        _from_zero(axes, xs)
    _legend(axes, ink, "" if rows else "after the first step")


def _learning_rate(axes, distilled, control, ink):
    _name(axes, "Learning rate", "optimizer step", "rate (1e-3)")
    for run, rows in (("ce_only", _thinned(control)), ("distilled", _thinned(distilled))):
        if rows:
            rates = numbers((r["lr"] for r in rows), 1000)
            axes.plot([r["step"] for r in rows], rates, color=COLOURS[run], lw=1.6, label=NAMES[run])
    axes.set_ylim(bottom=0)
    _from_zero(axes, [r["step"] for r in distilled + control])
    _legend(axes, ink, "" if distilled or control else "after the first step")


def _wall_clock(trained):
    """A function: seconds of training until a record, over all students one after the other."""
    lasted = {}
    for r in trained:
        lasted[r["run"], r["repeat"]] = r["elapsed_s"]
    before = {}
    for arm in lasted:
        before[arm] = sum(seconds for other, seconds in lasted.items() if other in before)
    return lambda r: before[r["run"], r["repeat"]] + r["elapsed_s"]


def _legend(axes, ink, empty):
    """The names of the lines between title and axes; or what there is to wait for."""
    if empty:
        _nothing(axes, empty)
    else:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.97), "ncols": 5, "borderaxespad": 0.3}
        axes.legend(frameon=False, labelcolor=ink, handlelength=1.3, columnspacing=1.0, **place)
        axes.set_title(axes.get_title(loc="left"), loc="left", y=1.0, pad=20)


def _name(axes, title, across, upwards):
    """Title and labels, at places that are given: to find out where nothing is in their way takes as long as the lines."""
    axes.set_title(title, loc="left", y=1.0)
    axes.set_xlabel(across)
    axes.set_ylabel(upwards)
    axes.xaxis.set_label_coords(0.5, -0.12)
    axes.yaxis.set_label_coords(-0.095, 0.5)
    axes.locator_params(nbins=5)


def _nothing(axes, when):
    axes.text(0.5, 0.5, when, transform=axes.transAxes, ha="center", va="center", alpha=0.6)
    axes.set_xticks([])
    axes.set_yticks([])


def _from_zero(axes, xs):
    longest = max(xs, default=0.0)
    axes.set_xlim(0, 1.03 * longest or 1.0)
    for line in axes.get_lines():
        if len(line.get_xdata()) == 1:  # which a line alone would not show
            line.set_marker("o")


def _over_time(rows, seconds):
    return [r["elapsed_s"] / seconds for r in rows], numbers(r["bits_per_byte"] for r in rows)


def _colour(name):
    return PART_COLOURS[PARTS.index(name)]


def _thinned(rows):
    """Every so many rows, and always the last one."""
    every = -(-len(rows) // MOST_POINTS) or 1
    return rows[(len(rows) - 1) % every :: every]
