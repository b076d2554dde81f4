"""Figures of a run's records, its verdict, and the internals of its models. A null value leaves a gap.

Each figure is a function of axes and data under `@figure`, which turns it into `name(data, theme="light")`.
"""

import io
import itertools
import math

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"]
"""Colour-blind safe colours of Okabe and Ito."""
COLOURS = {"distilled": "#D55E00", "ce_only": "#0072B2", "teacher": "#009E73", "student_before": "#999999"}
HELPED_COLOURS = {True: "#009E73", False: "#D55E00", None: "#999999"}
"""Colours of a gain by the verdict's `helped`; None: unclear."""
NAMES = {
    "distilled": "distilled", "ce_only": "control (plain training)", "teacher": "teacher",
    "student_before": "student before",
}  # fmt: skip
SCORE_LABEL = "bits per byte, validation text\n(lower is better)"
SHORT_NAMES = {"distilled": "distilled", "ce_only": "control"}
TERMS = {
    "lm": "next token (lm)", "kd": "distillation (kd)", "layerwise": "layers (layerwise)",
    "attention_alignment": "attention relations", "attention": "attention maps", "routing_feature": "routed layers",
    "contrastive": "contrastive",
}  # fmt: skip
TERM_COLOURS = dict(zip(TERMS, PALETTE, strict=False))


def _rc_params(text, back, grid):
    return {
        "font.size": 11, "axes.titlesize": 10, "figure.labelsize": 10, "legend.fontsize": 10, "legend.frameon": False,
        "image.cmap": "cividis", "lines.linewidth": 1.8, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": grid, "grid.color": grid,
        **dict.fromkeys(("axes.facecolor", "figure.facecolor"), back),
        **dict.fromkeys(("text.color", "lines.color", "axes.labelcolor", "xtick.color", "ytick.color"), text),
    }  # fmt: skip


THEMES = {"light": _rc_params("#1a1a1a", "#ffffff", "#d9d9d9"), "dark": _rc_params("#e8e8e8", "#14171a", "#3a3f44")}
VALIDATION, DISTILLED = {"split": "validation"}, {"run": "distilled", "repeat": 0}
"""Values of records that many figures select."""
PLACES = ("repeat", "step", "elapsed_s", "session")
"""Fields of a record that give its position in a figure."""
GIB = 2**30
NUM_COLOURS = 256
"""Colours of a PNG: a palette halves its size without a visible difference."""
MAX_SESSION_LABELS = 6
MAX_HEADROOM = 3.0
"""Total memory is drawn only below this multiple of the memory in use or predicted."""


class Picture(Figure):
    """Matplotlib figure that a notebook displays as a small PNG."""

    def png(self):
        """Returns the figure as the bytes of a PNG with `NUM_COLOURS` colours."""
        canvas, file = FigureCanvasAgg(self), io.BytesIO()
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        image.quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(file, "png", optimize=True)
        return file.getvalue()

    _repr_png_ = png


def figure(height=2.8, rows=1, columns=1, width=6.6, dpi=120, margins=None, rc=None):
    """Turns `plot(axes, data)` into a function of data and theme (`THEMES`) that returns a `Picture`.

    Sizes are in inches. With `columns=None`, `plot` makes its own axes in the `Picture` it gets. Fixed `margins` (of a
    matplotlib grid) render three times as fast as a constrained layout. `rc`: matplotlib settings beside the theme's.
    """

    def decorate(plot):
        def plot_picture(data, theme="light"):
            with matplotlib.rc_context({**THEMES[theme], **(rc or {})}):
                picture = Picture(figsize=(width, height), dpi=dpi, layout=None if margins else "constrained")
                plot(picture.subplots(rows, columns, gridspec_kw=margins) if columns else picture, data)
            return picture

        plot_picture.__name__, plot_picture.__doc__ = plot.__name__, plot.__doc__
        return plot_picture

    return decorate


def ink():
    """Returns the text colour of the theme of the figure that is being drawn."""
    return matplotlib.rcParams["text.color"]


def set_labels(axes, ncols=3, **properties):
    """Sets properties of the axes, and adds a legend above them if anything in them has a label."""
    axes.set(**properties)
    if axes.get_legend_handles_labels()[0]:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.2}
        axes.legend(ncols=ncols, columnspacing=1.4, handlelength=1.6, **place)


def number(value):
    """Returns a value to draw: NaN, which leaves a gap, for null (NaN or infinity in JSON) and infinity."""
    return value if value is not None and math.isfinite(value) else math.nan


def numbers(values, scale=1.0):
    """Returns values to draw, multiplied by `scale`."""
    return [scale * number(value) for value in values]


def known(values):
    """Returns the values that are finite numbers."""
    return [value for value in map(number, values) if not math.isnan(value)]


def written(value, form=""):
    """Formats a number; null and non-finite values become a dash."""
    return f"{value:{form}}" if known([value]) else "–"


def select(records, kind, **values):
    """Returns the records of one kind that have these values and can be drawn: none of their `PLACES` is null."""
    rows = [r for r in records if r["kind"] == kind and all(r.get(name) == value for name, value in values.items())]
    return [r for r in rows if len(known(r.get(name, 0) for name in PLACES)) == len(PLACES)]


def time_unit(seconds):
    """Returns `(name, seconds)` of a unit that suits the longest of some times."""
    longest = max(known(seconds), default=0.0)
    return ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)


def total_times(trained):
    """Returns the time of each train record on the training clocks of all students in sequence, in seconds."""
    durations = {(r["run"], r["repeat"]): r["elapsed_s"] for r in trained}
    starts = dict(zip(durations, itertools.accumulate(durations.values(), initial=0.0), strict=False))
    return [starts[r["run"], r["repeat"]] + r["elapsed_s"] for r in trained]


def zoom(axes, values):
    """Limits the y axis to the later values, so that a steep start does not flatten them."""
    values = sorted(known(values))
    if len(values) > 4:
        low, high = values[0], values[int(0.9 * (len(values) - 1))]
        margin = max(0.08 * (high - low), 1e-3)
        axes.set_ylim(low - margin, high + margin)


def smooth(values):
    """Returns the running mean over a fiftieth of the points. A gap (NaN) stays a gap and does not spread."""
    values = pd.Series(numbers(values), dtype=float)
    return values.rolling(max(1, len(values) // 50), min_periods=1).mean().where(values.notna())


@figure(height=3.6)
def learning_curves(axes, records):
    """Plots validation bits per byte over training time: a line per run, and the teacher's level."""
    points, labels = select(records, "eval", **VALIDATION), {}
    for run in SHORT_NAMES:
        count = len({r["repeat"] for r in points if r["run"] == run})
        suffix = f", {count} runs" if count > 1 else ""
        labels |= {(run, False): NAMES[run] + suffix, (run, True): f"{NAMES[run]}, averaged weights{suffix}"}
    unit, _ = plot_scores(axes, points, labels, ms=2.5, alpha=0.85)
    set_labels(axes, xlabel=f"training time ({unit})", ylabel=SCORE_LABEL)


def plot_scores(axes, points, labels, **style):
    """Plots bits per byte over training time: a line per student, dotted for averaged weights, and the teacher's level.

    `points`: eval records. `labels`: of the first repeat, by `(run, is averaged)`. Returns the `time_unit`.
    """
    unit, seconds = time_unit([r["elapsed_s"] for r in points])
    lines = {}
    for r in points:
        lines.setdefault((r["run"], r["repeat"], r.get("averaged", False)), []).append(r)
    for run, repeat, averaged in sorted(key for key in lines if key[0] != "teacher"):
        label = None if repeat else labels.get((run, averaged))
        xs, ys = _curve(lines[run, repeat, averaged], seconds)
        axes.plot(xs, ys, ":" if averaged else "-", color=COLOURS[run], marker="o", label=label, **style)
    for level in known(r["bits_per_byte"] for r in points if r["run"] == "teacher")[:1]:
        axes.axhline(level, color=COLOURS["teacher"], ls="--", lw=1.4, label=NAMES["teacher"])
    zoom(axes, [r["bits_per_byte"] for r in points if r["step"] or r["run"] == "teacher"])
    return unit, seconds


def _curve(points, seconds):
    return [r["elapsed_s"] / seconds for r in points], numbers(r["bits_per_byte"] for r in points)


@figure(height=3.6)
def compared(axes, runs):
    """Plots validation bits per byte over training time: each run's distilled student, and the first run's control.

    `runs`: records by name.
    """
    values = {"repeat": 0, "averaged": False, **VALIDATION}
    lines = {name: select(records, "eval", run="distilled", **values) for name, records in runs.items()}
    lines[NAMES["ce_only"]] = select(next(iter(runs.values()), []), "eval", run="ce_only", **values)
    unit, seconds = time_unit([r["elapsed_s"] for line in lines.values() for r in line])
    for i, (name, line) in enumerate(lines.items()):
        colour, shape = (ink(), "--") if name == NAMES["ce_only"] else (PALETTE[i % len(PALETTE)], "-")
        axes.plot(*_curve(line, seconds), shape, color=colour, marker="o", ms=3, label=name if line else None)
    zoom(axes, [r["bits_per_byte"] for line in lines.values() for r in line if r["step"]])
    set_labels(axes, xlabel=f"training time ({unit})", ylabel=SCORE_LABEL)


@figure(height=4.6, rows=2)
def loss_shares(axes, records):
    """Plots the terms of the distilled student's loss over its steps: in nats, and as shares of the total."""
    above, below = axes
    rows = [r for r in select(records, "train", **DISTILLED) if r["loss"] is not None and not r["skipped"]]
    if rows:
        stack_loss_terms(above, below, rows)
        above.set_xlim(rows[0]["step"], max(rows[-1]["step"], rows[0]["step"] + 1))
    set_labels(above, ylabel="weighted loss (nats)")
    below.set(ylabel="share (%)", ylim=(0, 100), xlabel="optimizer step")
    above.sharex(below)


def stack_loss_terms(above, below, rows):
    """Stacks the smoothed loss terms of train records over steps: in nats, and `below` in percent of the loss.

    Returns the values in nats, `[terms][rows]`.
    """
    names = _terms([r["shares"] for r in rows])
    steps, colours = [r["step"] for r in rows], [TERM_COLOURS[name] for name in names]
    shares = [numbers(r["shares"].get(name, 0.0) for r in rows) for name in names]
    nats = [smooth([share * r["loss"] for share, r in zip(line, rows, strict=True)]) for line in shares]
    above.stackplot(steps, nats, labels=[TERMS[name] for name in names], colors=colours, alpha=0.9)
    below.stackplot(steps, [100 * smooth(line) for line in shares], colors=colours, alpha=0.9)
    return nats


def _terms(shares):
    """Returns the names of the loss terms in some records' shares, in the order of `TERMS`."""
    return [name for name in TERMS if any(name in row for row in shares)]


@figure()
def gradient_shares(axes, records):
    """Plots each term's share of the gradient norm at the student's last hidden state."""
    plot_gradient_shares(axes, [r for r in select(records, "train", **DISTILLED) if r["grad_shares"]], marker="o", ms=3)
    set_labels(axes, ylim=(0, 100), xlabel="optimizer step", ylabel="share of the gradient (%)")


def plot_gradient_shares(axes, rows, **style):
    """Plots a line per loss term, in percent of the gradient norm over steps. `rows`: train records with a measurement."""
    for name in _terms([r["grad_shares"] for r in rows]):
        points = [(r["step"], 100 * number(r["grad_shares"][name])) for r in rows if name in r["grad_shares"]]
        axes.plot(*zip(*points, strict=True), color=TERM_COLOURS[name], label=TERMS[name], **style)


@figure(height=2.6)
def routing(axes, records):
    """Plots the router's mean weight of each tapped teacher layer."""
    rows = [r for r in select(records, "train", **DISTILLED) if "routing_0" in r["figures"]]
    layers = [name for name in rows[0]["figures"] if name.startswith("routing_")] if rows else []
    for i, layer in enumerate(layers):
        line = 100 * smooth([r["figures"].get(layer) for r in rows])
        label = f"tapped layer {i + 1} of {len(layers)}"
        axes.plot([r["step"] for r in rows], line, color=PALETTE[i % len(PALETTE)], label=label)
    set_labels(axes, ylim=(0, 100), xlabel="optimizer step", ylabel="mean weight (%)")


@figure()
def averaging(axes, records):
    """Plots the validation bits per byte that the exponential moving average of the weights saves."""
    axes.axhline(0, lw=1)
    for run in SHORT_NAMES:
        pairs = {}
        for r in select(records, "eval", run=run, repeat=0, **VALIDATION):
            pairs.setdefault(r["step"], {})[r["averaged"]] = number(r["bits_per_byte"])
        line = [(step, pair[False] - pair[True]) for step, pair in pairs.items() if len(pair) == 2]
        if line:
            axes.plot(*zip(*line, strict=True), color=COLOURS[run], marker="o", ms=3, label=NAMES[run])
    set_labels(axes, xlabel="optimizer step", ylabel="bits per byte saved\nby averaging")


@figure()
def memory(axes, records):
    """Plots memory in use over training time, total memory, and predicted peak memory, as far as they are known."""
    rows = select(records, "train")
    times = total_times(rows)
    unit, seconds = time_unit(times)
    for run, name in SHORT_NAMES.items():
        of_run = [(t / seconds, r["memory"]["used_bytes"]) for t, r in zip(times, rows, strict=True) if r["run"] == run]
        if of_run:
            xs, used = zip(*of_run, strict=True)
            axes.plot(xs, numbers(used, 1 / GIB), color=COLOURS[run], label=f"in use, {name}")
    used, predicted, total = (
        [size / GIB for size in known(r["memory"].get(f"{name}_bytes") for r in rows)]
        for name in ("used", "predicted", "total")
    )
    top = max(used + predicted, default=0.0)
    if total:
        is_visible = total[-1] < MAX_HEADROOM * top
        label = f"total {total[-1]:.1f} GiB" + ("" if is_visible else " (above)")
        axes.axhline(total[-1], ls="--", lw=1.4, label=label)
        top = total[-1] if is_visible else top
    if predicted:
        axes.axhline(max(predicted), color=COLOURS["teacher"], ls=":", lw=1.6, label="predicted peak")
    set_labels(axes, ncols=2, ylim=(0, 1.1 * top or 1.0), xlabel=f"training time ({unit})", ylabel="memory (GiB)")


@figure(height=4.2, rows=2)
def throughput(axes, records):
    """Plots the student's tokens per second, and computed tokens per real token: above 1 is padding."""
    above, below = axes
    for run in SHORT_NAMES:
        rows = select(records, "train", run=run, repeat=0)
        if rows:
            speeds = smooth([r["tokens_per_s"] for r in rows])
            above.plot([r["step"] for r in rows], speeds, color=COLOURS[run], label=NAMES[run])
    for side, shape in (("student", "-"), ("teacher", ":")):
        rows = [r for r in select(records, "train", **DISTILLED) if side in r["computed_per_token"]]
        if rows:
            ratios = smooth([r["computed_per_token"][side] for r in rows])
            below.plot([r["step"] for r in rows], ratios, shape, color=COLOURS["distilled"], label=f"the {side}'s")
    above.set_ylim(bottom=0)
    below.set_ylim(bottom=0.98)
    set_labels(above, ylabel="tokens per second")
    set_labels(below, xlabel="optimizer step", ylabel="computed tokens\nper real token")


@figure()
def sessions(axes, records):
    """Plots the sessions of each student over total training time, with alerts and the best evaluation."""
    trained, arms = select(records, "train"), {}
    times = total_times(trained)
    unit, seconds = time_unit(times)
    for r, time in zip(trained, times, strict=True):
        arms.setdefault((r["run"], r["repeat"]), []).append((r["session"], r["step"], time / seconds))
    start, labelled = 0.0, set()
    for row, ((run, repeat), steps) in enumerate(arms.items()):
        time_of = {0: start, **{step: time for _, step, time in steps}}
        for session, end in {session: time for session, _, time in steps}.items():
            is_new = session not in labelled and len(labelled) < MAX_SESSION_LABELS
            labelled.add(session)
            label = f"session {session}" if is_new else None
            colour = PALETTE[(session - 1) % len(PALETTE)]
            axes.barh(row, end - start, left=start, color=colour, height=0.55, label=label)
            start = end
        alerts = [time_of[r["step"]] for r in select(records, "alert", run=run, repeat=repeat) if r["step"] in time_of]
        axes.plot(alerts, [row] * len(alerts), "X", color=ink(), ms=7, label=None if row else "alert")
        scored = select(records, "eval", run=run, repeat=repeat, **VALIDATION)
        scored = [r for r in scored if known([r["bits_per_byte"]]) and r["step"] in time_of]
        if scored:
            best = time_of[min(scored, key=lambda r: r["bits_per_byte"])["step"]]
            axes.plot(best, row, "*", color=ink(), ms=11, label=None if row else "best weights")
    has_repeats = any(repeat for _, repeat in arms)
    axes.set_yticks(range(len(arms)), [SHORT_NAMES[run] + f", {repeat + 1}" * has_repeats for run, repeat in arms])
    axes.figure.set_figheight(1.3 + 0.42 * max(1, len(arms)))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    set_labels(axes, ncols=4, xlabel=f"training time of all students ({unit})")


@figure(height=1.9)
def gain(axes, verdict):
    """Plots bits per byte saved against the control: the interval, the mean, and single runs."""
    axes.axvline(0, lw=1)
    if known([verdict["gain"]]):
        ends, runs = numbers(verdict["interval"] or ()), numbers(verdict["gain_by_run"])
        colour = HELPED_COLOURS[verdict["helped"]]
        if known(ends):
            axes.plot(ends, [0, 0], color=colour, lw=7, solid_capstyle="butt", alpha=0.55, label="95 % interval")
        axes.plot(verdict["gain"], 0, "o", color=colour, ms=10, label="mean")
        if len(runs) > 1:
            axes.plot(runs, [0] * len(runs), "|", color=ink(), ms=16, label="runs")
        edge = 1.25 * max(abs(x) for x in [*known(ends), verdict["gain"], 1e-6])
        axes.set_xlim(-edge, edge)
        axes.legend(ncols=3, loc="upper left", bbox_to_anchor=(0, 1.32))
    axes.set_yticks([])
    axes.set_xlabel("bits per byte saved against plain training  (left of 0: worse, right: better)")
    axes.grid(axis="y", visible=False)


@figure()
def gains(axes, verdicts):
    """Plots the gain of each run over its own control, mean and interval. `verdicts`: by name."""
    verdicts = {name: verdict for name, verdict in verdicts.items() if known([verdict["gain"]])}
    axes.figure.set_figheight(1.2 + 0.42 * max(1, len(verdicts)))
    axes.axvline(0, lw=1)
    for row, verdict in enumerate(verdicts.values()):
        colour, ends = HELPED_COLOURS[verdict["helped"]], numbers(verdict["interval"] or (None, None))
        axes.plot(ends, [row, row], color=colour, lw=7, solid_capstyle="butt", alpha=0.55)
        axes.plot(verdict["gain"], row, "o", color=colour, ms=9)
    axes.set_yticks(range(len(verdicts)), list(verdicts))
    axes.grid(axis="y", visible=False)
    axes.set(ylim=(len(verdicts) - 0.4, -0.6), xlabel="bits per byte saved against plain training (95 % interval)")


@figure(height=2.2)
def bits_per_byte(axes, verdict):
    """Plots the four models' bits per byte on the test text as labelled bars."""
    scores = {name: verdict["bits_per_byte"][name] for name in ("teacher", "distilled", "ce_only", "student_before")}
    scores = {name: score for name, score in scores.items() if known([score])}
    names, values = [NAMES[name] for name in scores], list(scores.values())
    bars = axes.barh(range(len(scores)), values, color=[COLOURS[name] for name in scores], height=0.66)
    axes.bar_label(bars, [f" {value:.3f}" for value in values])
    axes.set_yticks(range(len(scores)), names)
    axes.set(xlim=(0, 1.12 * max(values, default=1.0)), xlabel="bits per byte, test text (lower is better)")
    axes.grid(axis="y", visible=False)


@figure(height=3.0, columns=3)
def agreement(axes, verdict):
    """Plots each student's top-1 agreement with the teacher by token frequency, position, and the teacher's entropy."""
    labels = {
        "frequency": "token's training count",
        "position": "position in window",
        "entropy": "teacher entropy (nats)",
    }
    for panel, (kind, label) in zip(axes, labels.items(), strict=True):
        for name in _students(verdict):
            sums = verdict["retention"][name][kind]
            used = [i for i, num in enumerate(sums["num"]) if num]
            shares = [100 * number(sums["agreed"][i]) / sums["num"][i] for i in used]
            panel.plot(range(len(used)), shares, color=COLOURS[name], marker="o", ms=4, label=NAMES[name])
            edges = [sums["from"][i] for i in used]
            edges = [f"{edge / 1000:g}k" if (edge or 0) >= 1000 else written(edge, "g") for edge in edges]
            panel.set_xticks(range(len(used)), edges, fontsize=9)
        panel.set_xlabel(label)
        panel.sharey(axes[0])
        panel.tick_params(labelleft=panel is axes[0])
    axes[0].set_ylabel("top-1 agreement (%)")
    heights = known(y for panel in axes for line in panel.lines for y in line.get_ydata())
    axes[0].set_ylim(0, 1.06 * max([1.0, *heights]))
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside upper center")


def _students(verdict):
    return [name for name in ("student_before", "ce_only", "distilled") if verdict["retention"][name]]


@figure(height=3.4)
def calibration(axes, verdict):
    """Plots the accuracy of each model's most likely token against its confidence: on the diagonal it is calibrated."""
    axes.plot([0, 100], [0, 100], color=ink(), lw=1, ls="--")
    for name in [*_students(verdict), "teacher"]:
        sums = (verdict["retention"][name] or {}).get("confidence")
        if sums:
            used = [i for i, num in enumerate(sums["num"]) if num]
            confidence, accuracy = (
                [100 * number(sums[key][i]) / sums["num"][i] for i in used] for key in ("confidence", "right")
            )
            label = f"{NAMES[name]}: error {written(verdict['calibration_error'][name], '.1%')}"
            axes.plot(confidence, accuracy, color=COLOURS[name], lw=1.6, marker="o", ms=4, label=label)
    axes.set(xlim=(0, 100), ylim=(0, 100))
    set_labels(axes, ncols=2, xlabel="confidence of the most likely token (%)", ylabel="accuracy (%)")


@figure(height=3.0, columns=2)
def alignment(axes, inside):
    """Plots the share of aligned positions in training windows, and the lengths of common spans in tokens."""
    left, right = axes
    counts = numbers(inside["coverage"])
    width = 100 / len(counts)
    left.bar([width * (i + 0.5) for i in range(len(counts))], counts, width=0.9 * width, color=COLOURS["teacher"])
    left.set(xlim=(0, 100), xlabel="aligned positions (%)", ylabel="training windows")
    names = [*map(str, range(1, len(inside["sizes"]))), f"{len(inside['sizes'])}+"]
    _heatmap(right, [numbers(row, 100) for row in inside["sizes"]], "{:.1f}")
    right.set_xticks(range(len(names)), names)
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="teacher tokens in a span", ylabel="student tokens", title="share of the spans (%)")


@figure(height=3.0, columns=None)
def attention_maps(picture, inside):
    """Plots attention between the spans of a held-out text for teacher and students, averaged over heads and layers."""
    names = [name for name in ("teacher", "ce_only", "distilled") if name in inside["attention"]]
    texts = ["".join(span["student"]).strip(" ").replace("\n", "\u21b5") or "\u2423" for span in inside["spans"]]
    axes = picture.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(axes, names, strict=True):
        rows = inside["attention"][name]
        shades = [[x**0.5 if x else math.nan for x in row] for row in rows]  # no colour for masked positions
        panel.imshow(shades, vmin=0, vmax=1)
        panel.set_title(NAMES[name])
        panel.grid(visible=False)
        labels = texts[1 : len(rows) + 1]
        panel.set_yticks(range(len(labels)), labels if panel is axes[0] else [""] * len(labels), fontsize=6)
        panel.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90)
        panel.tick_params(length=0)
    axes[0].set_ylabel("query")
    picture.supxlabel("key (brightness: square root of the attention)")


@figure(columns=None)
def layer_similarity(picture, inside):
    """Plots the similarity (`internals.cka`) of each student layer to each teacher layer on held-out positions."""
    maps = {name: inside["similarity"].get(name) for name in ("student_before", "ce_only", "distilled")}
    maps = {name: [numbers(row) for row in rows] for name, rows in maps.items() if rows}
    picture.set_figheight(1.6 + min(3.0, 0.35 * max(map(len, maps.values()))))
    axes = picture.subplots(1, len(maps), squeeze=False)[0]
    for panel, (name, values) in zip(axes, maps.items(), strict=True):
        image = _heatmap(panel, values, "{:.2f}", top=1.0)
        panel.set_title(NAMES[name])
        rows, columns = (range(0, count, math.ceil(count / 7)) for count in (len(values), len(values[0])))
        panel.set_yticks(rows, [i + 1 for i in rows] if panel is axes[0] else [""] * len(rows))
        panel.set_xticks(columns, [i + 1 for i in columns])
    axes[0].set_ylabel("student layer")
    picture.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    picture.supxlabel("teacher layer   (1: equal up to rotation and scale, 0: unrelated)")


def _heatmap(axes, rows, form, top=None):
    """Draws numbers as shades, with labels in small grids."""
    image = axes.imshow(rows, vmin=0, vmax=top, aspect="auto")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    if len(rows) <= 6 and len(rows[0]) <= 6:
        for y, row in enumerate(rows):
            for x, value in ((x, value) for x, value in enumerate(row) if known([value])):
                colour = "#ffffff" if image.norm(value) < 0.5 else "#000000"
                axes.text(x, y, form.format(value), ha="center", va="center", color=colour, fontsize=9)
    return image
