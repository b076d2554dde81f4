"""Records -> figures of how a run went, over its steps and its time. A number that is null leaves a gap."""

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
MANY_SESSIONS, NEAR = 6, 3.0
"""So many sessions are named in a legend; memory is drawn with its limit where that is no more than so many times higher."""


def learning_curves(records, theme="light"):
    """Validation bits per byte over training time, each run a line, the teacher as a level."""
    points = [r for r in placed(records) if r["kind"] == "eval" and r["split"] == "validation"]
    with figure(theme, height=3.6) as (made, axes):
        unit, seconds = time_unit([r["elapsed_s"] for r in points])
        for run in ("ce_only", "distilled"):
            repeats = sorted({r["repeat"] for r in points if r["run"] == run})
            for repeat in repeats:
                for averaged, style in ((False, "-"), (True, ":")):
                    line = [
                        r
                        for r in points
                        if (r["run"], r["repeat"], r.get("averaged", False)) == (run, repeat, averaged)
                    ]
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
    return made


def compared(runs, theme="light"):
    """Validation bits per byte over training time: the distilled student of each of `runs` (records by name), and the first
    one's control.
    """
    with figure(theme, height=3.6) as (made, axes):
        lines = {name: _scored(records, DISTILLED) for name, records in runs.items()}
        lines[NAMES[CONTROL]] = _scored(next(iter(runs.values()), []), CONTROL)
        unit, seconds = time_unit([r["elapsed_s"] for line in lines.values() for r in line])
        for place, (name, line) in enumerate(lines.items()):
            colour, style = (THEMES[theme]["text"], "--") if name == NAMES[CONTROL] else (PART_COLOURS[place % 8], "-")
            xs, ys = [r["elapsed_s"] / seconds for r in line], numbers(r["bits_per_byte"] for r in line)
            axes.plot(xs, ys, style, color=colour, lw=1.8, marker="o", ms=3, label=name if line else None)
        zoom(axes, [r["bits_per_byte"] for line in lines.values() for r in line if r["step"]])
        axes.set_xlabel(f"training time ({unit})")
        axes.set_ylabel("bits per byte, validation text\n(lower is better)")
        legend(axes, theme)
    return made


def loss_shares(records, theme="light"):
    """Parts of the distilled run's loss over its steps: what each adds in nats, and its share of the whole."""
    rows = [r for r in _distilled(records) if r["loss"] is not None and not r["skipped"]]
    with figure(theme, height=4.6, rows=2) as (made, (above, below)):
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
    return made


def gradient_shares(records, theme="light"):
    """Each part's share of the gradient where it touches the student, as often as it was measured."""
    rows = [r for r in _distilled(records) if r["grad_shares"]]
    with figure(theme, height=2.8) as (made, axes):
        names = _parts([r["grad_shares"] for r in rows])
        for name, colour in zip(names, _colours(names), strict=True):
            points = [(r["step"], 100 * number(r["grad_shares"][name])) for r in rows if name in r["grad_shares"]]
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.8, marker="o", ms=3, label=PART_NAMES[name])
        _percent_over_steps(axes, "share of the gradient (%)", theme)
    return made


def routing(records, theme="light"):
    """Mean weight of each tapped teacher layer in the mixture that the student's states choose."""
    rows = [r for r in _distilled(records) if "routing_0" in r["figures"]]
    with figure(theme, height=2.6) as (made, axes):
        layers = [name for name in rows[0]["figures"] if name.startswith("routing_")] if rows else []
        for i, layer in enumerate(layers):
            line = [100 * x for x in smooth([r["figures"].get(layer) for r in rows])]
            label = f"tapped layer {i + 1} of {len(layers)}"
            axes.plot([r["step"] for r in rows], line, color=PART_COLOURS[i % len(PART_COLOURS)], lw=1.8, label=label)
        _percent_over_steps(axes, "mean weight (%)", theme)
    return made


def averaging(records, theme="light"):
    """What the running average of the weights saves on validation text against the weights as they are."""
    pairs = {}
    for r in placed(records):
        if r["kind"] == "eval" and r["split"] == "validation" and r["run"] in (DISTILLED, CONTROL) and r["repeat"] == 0:
            pairs.setdefault((r["run"], r["step"]), {})[r["averaged"]] = number(r["bits_per_byte"])
    with figure(theme, height=2.8) as (made, axes):
        axes.axhline(0, color=THEMES[theme]["text"], lw=1)
        for run in (DISTILLED, CONTROL):
            line = [
                (step, both[False] - both[True])
                for (name, step), both in pairs.items()
                if name == run and len(both) == 2
            ]
            if line:
                axes.plot(*zip(*line, strict=True), color=COLOURS[run], lw=1.8, marker="o", ms=3, label=NAMES[run])
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("bits per byte saved\nby averaging")
        legend(axes, theme)
    return made


def memory(records, theme="light"):
    """Memory in use over the training time, what there is, and what was foretold; what the machine does not tell is left
    out.
    """
    rows = [r for r in placed(records) if r["kind"] == "train"]
    with figure(theme, height=2.8) as (made, axes):
        hours, name = _times(rows)
        for run in (DISTILLED, CONTROL):
            line = [
                (x, number(r["memory"]["used_bytes"]) / GIB)
                for x, r in zip(hours, rows, strict=True)
                if r["run"] == run
            ]
            if line:
                axes.plot(*zip(*line, strict=True), color=COLOURS[run], lw=1.8, label=f"in use, {SHORT_NAMES[run]}")
        told = {
            name: [size / GIB for size in known(r["memory"].get(f"{name}_bytes") for r in rows)]
            for name in ("used", "predicted", "total")
        }
        most = max(told["used"] + told["predicted"], default=0.0)
        if told["total"]:
            there = told["total"][-1]
            near = there < NEAR * most
            label = f"there are {there:.1f} GiB" + ("" if near else " (above)")
            axes.axhline(there, color=THEMES[theme]["text"], ls="--", lw=1.4, label=label)
            most = there if near else most
        if told["predicted"]:
            axes.axhline(max(told["predicted"]), color=COLOURS["teacher"], ls=":", lw=1.6, label="foretold")
        axes.set_ylim(0, 1.1 * most or 1.0)
        axes.set_xlabel(f"training time ({name})")
        axes.set_ylabel("memory (GiB)")
        legend(axes, theme, ncols=2)
    return made


def throughput(records, theme="light"):
    """The student's tokens a second, and tokens computed for each real one: what is above 1 is padding."""
    with figure(theme, height=4.2, rows=2) as (made, (above, below)):
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
        above.set_ylabel("tokens a second")
        below.set_ylabel("tokens computed\nfor each real one")
        below.set_ylim(bottom=0.98)
        below.set_xlabel("optimizer step")
        legend(above, theme)
        legend(below, theme)
    return made


def sessions(records, theme="light"):
    """Which session trained which student when, over all training time, with alerts and the best evaluation."""
    records = placed(records)
    arms = list(dict.fromkeys((r["repeat"], r["run"]) for r in records if r["kind"] == "train"))
    told = [r for r in records if r["kind"] in ("train", "eval", "alert") and (r["repeat"], r["run"]) in arms]
    unit, seconds = time_unit([sum(max(r["elapsed_s"] for r in _of(told, arm) if "elapsed_s" in r) for arm in arms)])
    with figure(theme, height=1.3 + 0.42 * max(1, len(arms))) as (made, axes):
        begin, shown = 0.0, set()
        for place, arm in enumerate(arms):
            rows = _of(told, arm)
            at = {r["step"]: begin + r["elapsed_s"] / seconds for r in rows if "elapsed_s" in r}
            start = begin
            for session in sorted({r["session"] for r in rows if r["kind"] == "train"}):
                end = max(
                    begin + r["elapsed_s"] / seconds for r in rows if r["session"] == session and "elapsed_s" in r
                )
                label = f"session {session}" if session not in shown and len(shown) < MANY_SESSIONS else None
                shown.add(session)
                colour = PART_COLOURS[(session - 1) % len(PART_COLOURS)]
                axes.barh(place, end - start, left=start, color=colour, height=0.55, label=label)
                start = end
            alerts = [at[r["step"]] for r in rows if r["kind"] == "alert" and r["step"] in at]
            scored = [
                r for r in rows if r["kind"] == "eval" and r["split"] == "validation" and known([r["bits_per_byte"]])
            ]
            ink = THEMES[theme]["text"]
            axes.plot(alerts, [place] * len(alerts), "X", color=ink, ms=7, label=None if place else "alert")
            if scored:
                best = at[min(scored, key=lambda r: r["bits_per_byte"])["step"]]
                axes.plot(best, place, "*", color=ink, ms=11, label=None if place else "best weights")
            begin = max(at.values())
        axes.set_yticks(range(len(arms)), [_arm_name(arm, arms) for arm in arms])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"training time of all students ({unit})")
        legend(axes, theme, ncols=4)
    return made


def measured(records, field, name=None):
    """Whether the distilled run's train records hold this field (with this name in it)."""
    return any(r[field] and (name is None or name in r[field]) for r in _distilled(records))


def has_averages(records):
    """Whether averaged weights were scored."""
    return any(r["kind"] == "eval" and r.get("averaged") and r["split"] == "validation" for r in records)


def _percent_over_steps(axes, label, theme):
    axes.set_ylim(0, 100)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    legend(axes, theme)


def _distilled(records):
    return [r for r in placed(records) if r["kind"] == "train" and r["run"] == DISTILLED and r["repeat"] == 0]


def _scored(records, run):
    """The validation records of a student's weights as they are."""
    found = [r for r in placed(records) if r["kind"] == "eval" and r["split"] == "validation" and r["run"] == run]
    return [r for r in found if r["repeat"] == 0 and not r.get("averaged")]


def _of(records, arm):
    return [r for r in records if (r["repeat"], r["run"]) == arm]


def _arm_name(arm, arms):
    repeat, run = arm
    several = len({repeat for repeat, _ in arms}) > 1
    return SHORT_NAMES[run] + (f", {repeat + 1}" if several else "")


def _times(rows):
    """When each record was made, in training time of all students one after the other; and the unit."""
    begin, last, arm, times = 0.0, 0.0, None, []
    for r in rows:
        if (r["repeat"], r["run"]) != arm:
            begin, arm = begin + last, (r["repeat"], r["run"])
        last = r["elapsed_s"]
        times.append(begin + last)
    unit, seconds = time_unit(times)
    return [time / seconds for time in times], unit


def _parts(shares):
    """The parts that occur in some records' shares, always in the same order."""
    return [name for name in PARTS if any(name in row for row in shares)]


def _colours(names):
    return [PART_COLOURS[PARTS.index(name)] for name in names]
