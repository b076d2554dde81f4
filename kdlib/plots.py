"""Records -> figures of how a run went, over its steps and its time."""

from kdlib.style import COLOURS, NAMES, PART_COLOURS, PART_NAMES, PARTS, THEMES, figure


def learning_curves(records, theme="light"):
    """Validation bits per byte over training time, each run a line, the teacher as a level."""
    points = [r for r in records if r["kind"] == "eval" and r["split"] == "validation"]
    with figure(theme, height=3.6) as (made, axes):
        unit, seconds = _time_unit([r["elapsed_s"] for r in points])
        for run in ("ce_only", "distilled"):
            repeats = sorted({r["repeat"] for r in points if r["run"] == run})
            for repeat in repeats:
                for averaged, style in ((False, "-"), (True, ":")):
                    line = [
                        r
                        for r in points
                        if (r["run"], r["repeat"], r.get("averaged", False)) == (run, repeat, averaged)
                    ]
                    xs, ys = [r["elapsed_s"] / seconds for r in line], [r["bits_per_byte"] for r in line]
                    label = NAMES[run] + (", averaged weights" if averaged else "")
                    label += f", {len(repeats)} runs" if len(repeats) > 1 else ""
                    label = label if line and repeat == repeats[0] else None
                    axes.plot(xs, ys, style, color=COLOURS[run], lw=1.8, marker="o", ms=2.5, alpha=0.85, label=label)
        _zoom(axes, [r["bits_per_byte"] for r in points if r["step"] or r["run"] == "teacher"])
        for r in points:
            if r["run"] == "teacher":
                axes.axhline(r["bits_per_byte"], color=COLOURS["teacher"], ls="--", lw=1.4, label=NAMES["teacher"])
        axes.set_xlabel(f"training time ({unit})")
        axes.set_ylabel("bits per byte, validation text\n(lower is better)")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, labelcolor=THEMES[theme]["text"])
    return made


def loss_shares(records, theme="light"):
    """Parts of the distilled run's loss over its steps: what each adds in nats, and its share of the whole."""
    rows = [r for r in _distilled(records) if r["loss"] is not None and not r["skipped"]]
    with figure(theme, height=4.6, rows=2) as (made, (above, below)):
        if rows:
            names = _parts([r["shares"] for r in rows])
            steps = [r["step"] for r in rows]
            smooth = _smoother(len(rows))
            shares = [smooth([r["shares"].get(name, 0.0) for r in rows]) for name in names]
            added = [smooth([r["shares"].get(name, 0.0) * r["loss"] for r in rows]) for name in names]
            above.stackplot(steps, added, labels=[PART_NAMES[n] for n in names], colors=_colours(names), alpha=0.9)
            below.stackplot(steps, [[100 * x for x in line] for line in shares], colors=_colours(names), alpha=0.9)
            above.legend(frameon=False, labelcolor=THEMES[theme]["text"], ncols=2, loc="upper right")
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
            points = [(r["step"], 100 * r["grad_shares"][name]) for r in rows if name in r["grad_shares"]]
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.8, marker="o", ms=3, label=PART_NAMES[name])
        _percent_over_steps(axes, "share of the gradient (%)", theme)
    return made


def routing(records, theme="light"):
    """Mean weight of each tapped teacher layer in the mixture that the student's states choose."""
    rows = [r for r in _distilled(records) if "routing_0" in r["figures"]]
    with figure(theme, height=2.6) as (made, axes):
        layers = [name for name in rows[0]["figures"] if name.startswith("routing_")] if rows else []
        smooth = _smoother(len(rows))
        for i, layer in enumerate(layers):
            line = [100 * x for x in smooth([r["figures"][layer] for r in rows])]
            label = f"tapped layer {i + 1} of {len(layers)}"
            axes.plot([r["step"] for r in rows], line, color=PART_COLOURS[i % len(PART_COLOURS)], lw=1.8, label=label)
        _percent_over_steps(axes, "mean weight (%)", theme)
    return made


def measured(records, field, name=None):
    """Whether the distilled run's train records hold this field (with this name in it)."""
    return any(r[field] and (name is None or name in r[field]) for r in _distilled(records))


def _percent_over_steps(axes, label, theme):
    axes.set_ylim(0, 100)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=THEMES[theme]["text"], ncols=2, loc="upper right")


def _distilled(records):
    return [r for r in records if r["kind"] == "train" and r["run"] == "distilled" and r["repeat"] == 0]


def _parts(shares):
    """The parts that occur in some records' shares, always in the same order."""
    return [name for name in PARTS if any(name in row for row in shares)]


def _colours(names):
    return [PART_COLOURS[PARTS.index(name)] for name in names]


def _time_unit(seconds):
    longest = max(seconds, default=0.0)
    return ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)


def _zoom(axes, values):
    """Leave out the fall of the first evaluations, where the end is what matters."""
    if len(values) > 4:
        low, high = min(values), sorted(values)[int(0.9 * (len(values) - 1))]
        margin = max(0.08 * (high - low), 1e-3)
        axes.set_ylim(low - margin, high + margin)


def _smoother(count):
    """A running mean over a fiftieth of the points, so that stacked areas can be read."""
    width = max(1, count // 50)

    def smooth(values):
        sums = [0.0]
        for value in values:
            sums.append(sums[-1] + value)
        starts = [max(0, i + 1 - width) for i in range(len(values))]
        return [(sums[i + 1] - sums[start]) / (i + 1 - start) for i, start in enumerate(starts)]

    return smooth
