"""Figures of a run's verdict and of the internals of its models (`figures/inside.json`). A null value leaves a gap."""

import math

from kdlib.report.style import COLOURS, NAMES, SHADES, THEMES, figure, known, legend, number, numbers, written

HELPED_COLOURS = {True: COLOURS["teacher"], False: COLOURS["distilled"], None: "#999999"}
"""Colours of a gain by the verdict's `helped`; None: unclear."""


def gain(verdict, theme="light"):
    """Plots bits per byte saved against the control: the interval, the mean, and single runs."""
    with figure(theme, height=1.9) as (picture, axes):
        ink = THEMES[theme]["text"]
        axes.axvline(0, color=ink, lw=1)
        if known([verdict["gain"]]):
            ends, runs = numbers(verdict["interval"] or ()), numbers(verdict["gain_by_run"])
            colour = HELPED_COLOURS[verdict["helped"]]
            if known(ends):
                axes.plot(ends, [0, 0], color=colour, lw=7, solid_capstyle="butt", alpha=0.55, label="95 % interval")
            axes.plot(verdict["gain"], 0, "o", color=colour, ms=10, label="mean")
            if len(runs) > 1:
                axes.plot(runs, [0] * len(runs), "|", color=ink, ms=16, label="runs")
            edge = 1.25 * max(abs(x) for x in [*known(ends), verdict["gain"], 1e-6])
            axes.set_xlim(-edge, edge)
            axes.legend(frameon=False, labelcolor=ink, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.32))
        axes.set_yticks([])
        axes.set_xlabel("bits per byte saved against plain training  (left of 0: worse, right: better)")
        axes.grid(axis="y", visible=False)
    return picture


def gains(verdicts, theme="light"):
    """Plots the gain of each run over its own control, mean and interval. `verdicts`: by name."""
    verdicts = {name: verdict for name, verdict in verdicts.items() if known([verdict["gain"]])}
    with figure(theme, height=1.2 + 0.42 * max(1, len(verdicts))) as (picture, axes):
        axes.axvline(0, color=THEMES[theme]["text"], lw=1)
        for row, verdict in enumerate(verdicts.values()):
            colour = HELPED_COLOURS[verdict["helped"]]
            ends = numbers(verdict["interval"] or (None, None))
            axes.plot(ends, [row, row], color=colour, lw=7, solid_capstyle="butt", alpha=0.55)
            axes.plot(verdict["gain"], row, "o", color=colour, ms=9)
        axes.set_yticks(range(len(verdicts)), list(verdicts))
        axes.set_ylim(len(verdicts) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("bits per byte saved against plain training (95 % interval)")
    return picture


def bits_per_byte(verdict, theme="light"):
    """Plots the four models' bits per byte on the test text as labelled bars."""
    bars = [(n, verdict["bits_per_byte"][n]) for n in ("teacher", "distilled", "ce_only", "student_before")]
    bars = [(name, value) for name, value in bars if known([value])]
    with figure(theme, height=2.2) as (picture, axes):
        for row, (name, value) in enumerate(bars):
            axes.barh(row, value, color=COLOURS[name], height=0.66)
            axes.text(value, row, f" {value:.3f}", va="center", color=THEMES[theme]["text"])
        axes.set_yticks(range(len(bars)), [NAMES[name] for name, _ in bars])
        axes.set_xlim(0, 1.12 * max((value for _, value in bars), default=1.0))
        axes.set_xlabel("bits per byte, test text (lower is better)")
        axes.grid(axis="y", visible=False)
    return picture


def agreement(verdict, theme="light"):
    """Plots each student's top-1 agreement with the teacher by token frequency, position, and the teacher's entropy."""
    titles = {
        "frequency": "token's training count",
        "position": "position in window",
        "entropy": "teacher entropy (nats)",
    }
    with figure(theme, height=3.0, columns=3) as (picture, axes):
        for column, (kind, title) in enumerate(titles.items()):
            tables = {name: verdict["retention"][name][kind] for name in _students(verdict)}
            _plot_over_bins(axes[column], tables, "agreed")
            axes[column].set_xlabel(title)
            axes[column].sharey(axes[0])
            axes[column].tick_params(labelleft=column == 0)
        axes[0].set_ylabel("top-1 agreement (%)")
        heights = known(y for panel in axes for line in panel.lines for y in line.get_ydata())
        axes[0].set_ylim(0, 1.06 * max([1.0, *heights]))
        handles, labels = axes[0].get_legend_handles_labels()
        picture.legend(
            handles, labels, frameon=False, labelcolor=THEMES[theme]["text"], ncols=3, loc="outside upper center"
        )
    return picture


def calibration(verdict, theme="light"):
    """Plots the accuracy of each model's most likely token against its confidence: on the diagonal it is calibrated."""
    with figure(theme, height=3.4) as (picture, axes):
        ink = THEMES[theme]["text"]
        axes.plot([0, 100], [0, 100], color=ink, lw=1, ls="--")
        for name in [*_students(verdict), "teacher"]:
            sums = (verdict["retention"][name] or {}).get("confidence")
            if sums:
                used = [i for i, num in enumerate(sums["num"]) if num]
                confidence, accuracy = (
                    [100 * number(sums[key][i]) / sums["num"][i] for i in used] for key in ("confidence", "right")
                )
                label = f"{NAMES[name]}: error {written(verdict['calibration_error'][name], '.1%')}"
                axes.plot(confidence, accuracy, color=COLOURS[name], lw=1.6, marker="o", ms=4, label=label)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_xlabel("confidence of the most likely token (%)")
        axes.set_ylabel("accuracy (%)")
        legend(axes, theme, ncols=2)
    return picture


def alignment(inside, theme="light"):
    """Plots the share of aligned positions in training windows, and the lengths of common spans in tokens."""
    with figure(theme, height=3.0, columns=2) as (picture, (left, right)):
        counts = numbers(inside["coverage"])
        width = 100 / len(counts)
        left.bar([width * (i + 0.5) for i in range(len(counts))], counts, width=0.9 * width, color=COLOURS["teacher"])
        left.set_xlim(0, 100)
        left.set_xlabel("aligned positions (%)")
        left.set_ylabel("training windows")
        names = [*map(str, range(1, len(inside["sizes"]))), f"{len(inside['sizes'])}+"]
        _heatmap(right, [numbers(row, 100) for row in inside["sizes"]], "{:.1f}")
        right.set_xticks(range(len(names)), names)
        right.set_yticks(range(len(names)), names)
        right.set_xlabel("teacher tokens in a span")
        right.set_ylabel("student tokens")
        right.set_title("share of the spans (%)", fontsize=10)
    return picture


def attention_maps(inside, theme="light"):
    """Plots attention between the spans of a held-out text for teacher and students, averaged over heads and layers."""
    names = [name for name in ("teacher", "ce_only", "distilled") if name in inside["attention"]]
    texts = [_visible("".join(span["student"])) for span in inside["spans"]]
    with figure(theme, height=3.0, columns=len(names)) as (picture, axes):
        for column, (name, panel) in enumerate(zip(names, _as_list(axes), strict=True)):
            rows = inside["attention"][name]
            shades = [[x**0.5 if x else math.nan for x in row] for row in rows]  # no colour for masked positions
            panel.imshow(shades, cmap=SHADES, vmin=0, vmax=1)
            panel.set_title(NAMES[name], fontsize=10)
            panel.grid(visible=False)
            labels = texts[1 : len(rows) + 1]
            panel.set_yticks(range(len(labels)), labels if column == 0 else [""] * len(labels), fontsize=6)
            panel.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90)
            panel.tick_params(length=0)
        _as_list(axes)[0].set_ylabel("query")
        picture.supxlabel("key (brightness: square root of the attention)", fontsize=10)
    return picture


def layer_similarity(inside, theme="light"):
    """Plots the similarity (`internals.cka`) of each student layer to each teacher layer on held-out positions."""
    names = [name for name in ("student_before", "ce_only", "distilled") if name in inside["similarity"]]
    tallest = max(len(inside["similarity"][name]) for name in names)
    with figure(theme, height=1.6 + min(3.0, 0.35 * tallest), columns=len(names)) as (picture, axes):
        for column, (name, panel) in enumerate(zip(names, _as_list(axes), strict=True)):
            values = [numbers(row) for row in inside["similarity"][name]]
            image = _heatmap(panel, values, "{:.2f}", top=1.0)
            panel.set_title(NAMES[name], fontsize=10)
            rows, columns = _sparse_ticks(len(values)), _sparse_ticks(len(values[0]))
            panel.set_yticks(rows, [i + 1 for i in rows] if column == 0 else [""] * len(rows))
            panel.set_xticks(columns, [i + 1 for i in columns])
        _as_list(axes)[0].set_ylabel("student layer")
        picture.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
        picture.supxlabel("teacher layer   (1: equal up to rotation and scale, 0: unrelated)", fontsize=10)
    return picture


def _students(verdict):
    return [name for name in ("student_before", "ce_only", "distilled") if verdict["retention"][name]]


def _plot_over_bins(axes, tables, name):
    """Plots each student's mean of one sum over the non-empty bins."""
    if not tables:
        return
    first = next(iter(tables.values()))
    used = [i for i, num in enumerate(first["num"]) if num]
    for student, sums in tables.items():
        values = [100 * number(sums[name][i]) / (sums["num"][i] or math.nan) for i in used]
        axes.plot(range(len(used)), values, color=COLOURS[student], lw=1.8, marker="o", ms=4, label=NAMES[student])
    axes.set_xticks(range(len(used)), [_short_number(first["from"][i]) for i in used], fontsize=9)


def _short_number(bound):
    """Formats the lower edge of a bin: 0.5, 10, 1k."""
    return f"{bound / 1000:g}k" if (bound or 0) >= 1000 else written(bound, "g")


def _heatmap(axes, rows, form, top=None):
    """Draws numbers as shades, with labels in small grids."""
    image = axes.imshow(rows, cmap=SHADES, vmin=0, vmax=top, aspect="auto")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    if len(rows) <= 6 and len(rows[0]) <= 6:
        for y, row in enumerate(rows):
            for x, value in ((x, value) for x, value in enumerate(row) if known([value])):
                ink = "#ffffff" if image.norm(value) < 0.5 else "#000000"
                axes.text(x, y, form.format(value), ha="center", va="center", color=ink, fontsize=9)
    return image


def _visible(text):
    """Returns the text of a span as a label with visible line breaks and spaces."""
    return text.strip(" ").replace("\n", "\u21b5") or "\u2423"


def _sparse_ticks(count):
    """Returns at most seven evenly spaced ticks."""
    return list(range(0, count, max(1, -(-count // 7))))


def _as_list(axes):
    return list(axes.flat) if hasattr(axes, "flat") else [axes]
