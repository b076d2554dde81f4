"""Figures of a run's records over steps and time. A null value leaves a gap."""

from kdlib.report.style import (
    COLOURS,
    NAMES,
    PART_COLOURS,
    PART_NAMES,
    PARTS,
    THEMES,
    figure,
    known,
    legend,
    number,
    numbers,
    placed,
    smooth,
    time_unit,
    zoom,
)

DISTILLED, CONTROL = "distilled", "ce_only"
SHORT_NAMES = {DISTILLED: "distilled", CONTROL: "control"}
GIB = 2**30
MAX_SESSION_LABELS = 6
MAX_HEADROOM = 3.0
"""Total memory is drawn only below this multiple of the memory in use or predicted."""


def learning_curves(records, theme="light"):
    """Plots validation bits per byte over training time: a line per run, and the teacher's level."""
    points = [r for r in placed(records) if r["kind"] == "eval" and r["split"] == "validation"]
    with figure(theme, height=3.6) as (picture, axes):
        unit, seconds = time_unit([r["elapsed_s"] for r in points])
        for run in ("ce_only", "distilled"):
            repeats = sorted({r["repeat"] for r in points if r["run"] == run})
            for repeat in repeats:
                for averaged, style in ((False, "-"), (True, ":")):
                    key = run, repeat, averaged
                    line = [r for r in points if (r["run"], r["repeat"], r.get("averaged", False)) == key]
                    xs, ys = [r["elapsed_s"] / seconds for r in line], numbers(r["bits_per_byte"] for r in line)
                    label = NAMES[run] + (", averaged weights" if averaged else "")
                    label += f", {len(repeats)} runs" if len(repeats) > 1 else ""
                    label = label if line and repeat == repeats[0] else None
                    axes.plot(xs, ys, style, color=COLOURS[run], lw=1.8, marker="o", ms=2.5, alpha=0.85, label=label)
        zoom(axes, [r["bits_per_byte"] for r in points if r["step"] or r["run"] == "teacher"])
        for r in points:
            if r["run"] == "teacher" and known([r["bits_per_byte"]]):
                axes.axhline(r["bits_per_byte"], color=COLOURS["teacher"], ls="--", lw=1.4, label=NAMES["teacher"])
        axes.set_xlabel(f"training time ({unit})")
        axes.set_ylabel("bits per byte, validation text\n(lower is better)")
        legend(axes, theme)
    return picture


def compared(runs, theme="light"):
    """Plots validation bits per byte over training time: each run's distilled student, and the first run's control.

    `runs`: records by name.
    """
    with figure(theme, height=3.6) as (picture, axes):
        lines = {name: _scored(records, DISTILLED) for name, records in runs.items()}
        lines[NAMES[CONTROL]] = _scored(next(iter(runs.values()), []), CONTROL)
        unit, seconds = time_unit([r["elapsed_s"] for line in lines.values() for r in line])
        for i, (name, line) in enumerate(lines.items()):
            colour, style = (THEMES[theme]["text"], "--") if name == NAMES[CONTROL] else (PART_COLOURS[i % 8], "-")
            xs, ys = [r["elapsed_s"] / seconds for r in line], numbers(r["bits_per_byte"] for r in line)
            axes.plot(xs, ys, style, color=colour, lw=1.8, marker="o", ms=3, label=name if line else None)
        zoom(axes, [r["bits_per_byte"] for line in lines.values() for r in line if r["step"]])
        axes.set_xlabel(f"training time ({unit})")
        axes.set_ylabel("bits per byte, validation text\n(lower is better)")
        legend(axes, theme)
    return picture


def loss_shares(records, theme="light"):
    """Plots the terms of the distilled student's loss over its steps: in nats, and as shares of the total."""
    rows = [r for r in _distilled(records) if r["loss"] is not None and not r["skipped"]]
    with figure(theme, height=4.6, rows=2) as (picture, (above, below)):
        if rows:
            names = _parts([r["shares"] for r in rows])
            steps = [r["step"] for r in rows]
            shares = [smooth([r["shares"].get(name, 0.0) for r in rows]) for name in names]
            added = [smooth([number(r["shares"].get(name, 0.0)) * r["loss"] for r in rows]) for name in names]
            above.stackplot(steps, added, labels=[PART_NAMES[n] for n in names], colors=_colours(names), alpha=0.9)
            below.stackplot(steps, [[100 * x for x in line] for line in shares], colors=_colours(names), alpha=0.9)
            legend(above, theme)
            above.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
        above.set_ylabel("weighted loss (nats)")
        below.set_ylabel("share (%)")
        below.set_ylim(0, 100)
        below.set_xlabel("optimizer step")
        above.sharex(below)
    return picture


def gradient_shares(records, theme="light"):
    """Plots each term's share of the gradient norm at the student's last hidden state."""
    rows = [r for r in _distilled(records) if r["grad_shares"]]
    with figure(theme, height=2.8) as (picture, axes):
        names = _parts([r["grad_shares"] for r in rows])
        for name, colour in zip(names, _colours(names), strict=True):
            points = [(r["step"], 100 * number(r["grad_shares"][name])) for r in rows if name in r["grad_shares"]]
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.8, marker="o", ms=3, label=PART_NAMES[name])
        _percent_over_steps(axes, "share of the gradient (%)", theme)
    return picture


def routing(records, theme="light"):
    """Plots the router's mean weight of each tapped teacher layer."""
    rows = [r for r in _distilled(records) if "routing_0" in r["figures"]]
    with figure(theme, height=2.6) as (picture, axes):
        layers = [name for name in rows[0]["figures"] if name.startswith("routing_")] if rows else []
        for i, layer in enumerate(layers):
            line = [100 * x for x in smooth([r["figures"].get(layer) for r in rows])]
            label = f"tapped layer {i + 1} of {len(layers)}"
            axes.plot([r["step"] for r in rows], line, color=PART_COLOURS[i % len(PART_COLOURS)], lw=1.8, label=label)
        _percent_over_steps(axes, "mean weight (%)", theme)
    return picture


def averaging(records, theme="light"):
    """Plots the validation bits per byte that the exponential moving average of the weights saves."""
    pairs = {}
    for r in placed(records):
        if r["kind"] == "eval" and r["split"] == "validation" and r["run"] in (DISTILLED, CONTROL) and r["repeat"] == 0:
            pairs.setdefault((r["run"], r["step"]), {})[r["averaged"]] = number(r["bits_per_byte"])
    with figure(theme, height=2.8) as (picture, axes):
        axes.axhline(0, color=THEMES[theme]["text"], lw=1)
        for run in (DISTILLED, CONTROL):
            scored = [(step, pair) for (name, step), pair in pairs.items() if name == run and len(pair) == 2]
            line = [(step, pair[False] - pair[True]) for step, pair in scored]
            if line:
                axes.plot(*zip(*line, strict=True), color=COLOURS[run], lw=1.8, marker="o", ms=3, label=NAMES[run])
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("bits per byte saved\nby averaging")
        legend(axes, theme)
    return picture


def memory(records, theme="light"):
    """Plots memory in use over training time, total memory, and predicted peak memory, as far as they are known."""
    rows = [r for r in placed(records) if r["kind"] == "train"]
    with figure(theme, height=2.8) as (picture, axes):
        times, unit = _times(rows)
        for run in (DISTILLED, CONTROL):
            used = [number(r["memory"]["used_bytes"]) / GIB for r in rows]
            line = [(x, y) for x, y, r in zip(times, used, rows, strict=True) if r["run"] == run]
            if line:
                axes.plot(*zip(*line, strict=True), color=COLOURS[run], lw=1.8, label=f"in use, {SHORT_NAMES[run]}")
        used, predicted, total = (
            [size / GIB for size in known(r["memory"].get(f"{name}_bytes") for r in rows)]
            for name in ("used", "predicted", "total")
        )
        top = max(used + predicted, default=0.0)
        if total:
            is_visible = total[-1] < MAX_HEADROOM * top
            label = f"total {total[-1]:.1f} GiB" + ("" if is_visible else " (above)")
            axes.axhline(total[-1], color=THEMES[theme]["text"], ls="--", lw=1.4, label=label)
            top = total[-1] if is_visible else top
        if predicted:
            axes.axhline(max(predicted), color=COLOURS["teacher"], ls=":", lw=1.6, label="predicted peak")
        axes.set_ylim(0, 1.1 * top or 1.0)
        axes.set_xlabel(f"training time ({unit})")
        axes.set_ylabel("memory (GiB)")
        legend(axes, theme, ncols=2)
    return picture


def throughput(records, theme="light"):
    """Plots the student's tokens per second, and computed tokens per real token: above 1 is padding."""
    with figure(theme, height=4.2, rows=2) as (picture, (above, below)):
        for run in (DISTILLED, CONTROL):
            rows = [r for r in placed(records) if r["kind"] == "train" and r["run"] == run and r["repeat"] == 0]
            steps = [r["step"] for r in rows]
            if rows:
                speeds = smooth([r["tokens_per_s"] for r in rows])
                above.plot(steps, speeds, color=COLOURS[run], lw=1.8, label=NAMES[run])
            for side, style in (("student", "-"), ("teacher", ":")) if run == DISTILLED else ():
                line = [(r["step"], r["computed_per_token"][side]) for r in rows if side in r["computed_per_token"]]
                if line:
                    steps, values = zip(*line, strict=True)
                    below.plot(steps, smooth(values), style, color=COLOURS[run], lw=1.8, label=f"the {side}'s")
        above.set_ylim(bottom=0)
        above.set_ylabel("tokens per second")
        below.set_ylabel("computed tokens\nper real token")
        below.set_ylim(bottom=0.98)
        below.set_xlabel("optimizer step")
        legend(above, theme)
        legend(below, theme)
    return picture


def sessions(records, theme="light"):
    """Plots the sessions of each student over total training time, with alerts and the best evaluation."""
    records = placed(records)
    arms = list(dict.fromkeys((r["repeat"], r["run"]) for r in records if r["kind"] == "train"))
    shown = [r for r in records if r["kind"] in ("train", "eval", "alert") and (r["repeat"], r["run"]) in arms]
    unit, seconds = time_unit(
        [sum(max(r["elapsed_s"] for r in _select(shown, arm) if "elapsed_s" in r) for arm in arms)]
    )
    with figure(theme, height=1.3 + 0.42 * max(1, len(arms))) as (picture, axes):
        arm_start, labelled = 0.0, set()
        for row, arm in enumerate(arms):
            rows = _select(shown, arm)
            time_of = {r["step"]: arm_start + r["elapsed_s"] / seconds for r in rows if "elapsed_s" in r}
            start = arm_start
            for session in sorted({r["session"] for r in rows if r["kind"] == "train"}):
                timed = [r for r in rows if r["session"] == session and "elapsed_s" in r]
                end = max(arm_start + r["elapsed_s"] / seconds for r in timed)
                is_new = session not in labelled and len(labelled) < MAX_SESSION_LABELS
                label = f"session {session}" if is_new else None
                labelled.add(session)
                colour = PART_COLOURS[(session - 1) % len(PART_COLOURS)]
                axes.barh(row, end - start, left=start, color=colour, height=0.55, label=label)
                start = end
            alerts = [time_of[r["step"]] for r in rows if r["kind"] == "alert" and r["step"] in time_of]
            scored = [r for r in rows if r["kind"] == "eval" and r["split"] == "validation"]
            scored = [r for r in scored if known([r["bits_per_byte"]])]
            ink = THEMES[theme]["text"]
            axes.plot(alerts, [row] * len(alerts), "X", color=ink, ms=7, label=None if row else "alert")
            if scored:
                best = time_of[min(scored, key=lambda r: r["bits_per_byte"])["step"]]
                axes.plot(best, row, "*", color=ink, ms=11, label=None if row else "best weights")
            arm_start = max(time_of.values())
        axes.set_yticks(range(len(arms)), [_arm_name(arm, arms) for arm in arms])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"training time of all students ({unit})")
        legend(axes, theme, ncols=4)
    return picture


def measured(records, field, name=None):
    """Returns whether a train record of the distilled student has a value for `field` (that contains `name`)."""
    return any(r[field] and (name is None or name in r[field]) for r in _distilled(records))


def has_averages(records):
    """Returns whether averaged weights were evaluated."""
    return any(r["kind"] == "eval" and r.get("averaged") and r["split"] == "validation" for r in records)


def _percent_over_steps(axes, label, theme):
    axes.set_ylim(0, 100)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    legend(axes, theme)


def _distilled(records):
    return [r for r in placed(records) if r["kind"] == "train" and r["run"] == DISTILLED and r["repeat"] == 0]


def _scored(records, run):
    """Returns the validation records of a student's weights without averaging."""
    scored = [r for r in placed(records) if r["kind"] == "eval" and r["split"] == "validation" and r["run"] == run]
    return [r for r in scored if r["repeat"] == 0 and not r.get("averaged")]


def _select(records, arm):
    return [r for r in records if (r["repeat"], r["run"]) == arm]


def _arm_name(arm, arms):
    repeat, run = arm
    has_repeats = len({repeat for repeat, _ in arms}) > 1
    return SHORT_NAMES[run] + (f", {repeat + 1}" if has_repeats else "")


def _times(rows):
    """Returns each record's time on the training clocks of all students in sequence, and the unit."""
    arm_start, elapsed, arm, times = 0.0, 0.0, None, []
    for r in rows:
        if (r["repeat"], r["run"]) != arm:
            arm_start, arm = arm_start + elapsed, (r["repeat"], r["run"])
        elapsed = r["elapsed_s"]
        times.append(arm_start + elapsed)
    unit, seconds = time_unit(times)
    return [time / seconds for time in times], unit


def _parts(shares):
    """Returns the names of the loss terms in some records' shares, in the order of `PARTS`."""
    return [name for name in PARTS if any(name in row for row in shares)]


def _colours(names):
    return [PART_COLOURS[PARTS.index(name)] for name in names]
