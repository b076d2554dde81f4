"""What a run came to -> figures: its verdict, and its look inside the models (`figures/inside.json`). A number that is null
leaves a gap.
"""

import math

from kdlib.report.style import COLOURS, NAMES, SHADES, THEMES, figure, known, legend, number, numbers, written

HELPED_COLOURS = {True: COLOURS["teacher"], False: COLOURS["distilled"], None: "#999999"}
"""Of a gain: it helped, it did not, nobody can tell."""


def gain(verdict, theme="light"):
    """Bits per byte saved against the control: the interval, the mean, every run."""
    with figure(theme, height=1.9) as (made, axes):
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
    return made


def gains(verdicts, theme="light"):
    """What several runs gained, each against its own control: mean and interval, one under the other."""
    told = {name: verdict for name, verdict in verdicts.items() if known([verdict["gain"]])}
    with figure(theme, height=1.2 + 0.42 * max(1, len(told))) as (made, axes):
        axes.axvline(0, color=THEMES[theme]["text"], lw=1)
        for place, verdict in enumerate(told.values()):
            colour = HELPED_COLOURS[verdict["helped"]]
            ends = numbers(verdict["interval"] or (None, None))
            axes.plot(ends, [place, place], color=colour, lw=7, solid_capstyle="butt", alpha=0.55)
            axes.plot(verdict["gain"], place, "o", color=colour, ms=9)
        axes.set_yticks(range(len(told)), list(told))
        axes.set_ylim(len(told) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("bits per byte saved against plain training (95 % interval)")
    return made


def bits_per_byte(verdict, theme="light"):
    """Bits per byte of the four models on the test text, as bars with their numbers."""
    shown = [(n, verdict["bits_per_byte"][n]) for n in ("student_before", "ce_only", "distilled", "teacher")]
    shown = [(name, value) for name, value in shown if known([value])]
    with figure(theme, height=2.2) as (made, axes):
        for place, (name, value) in enumerate(reversed(shown)):
            axes.barh(place, value, color=COLOURS[name], height=0.66)
            axes.text(value, place, f" {value:.3f}", va="center", color=THEMES[theme]["text"])
        axes.set_yticks(range(len(shown)), [NAMES[name] for name, _ in reversed(shown)])
        axes.set_xlim(0, 1.12 * max((value for _, value in shown), default=1.0))
        axes.set_xlabel("bits per byte, test text (lower is better)")
        axes.grid(axis="y", visible=False)
    return made


def agreement(verdict, theme="light"):
    """How often each student's likeliest token is the teacher's: by how frequent the next token is, how much was read before
    it, and how unsure the teacher is.
    """
    titles = {
        "frequency": "times the next token stands\nin the training text",
        "position": "tokens read before it",
        "entropy": "teacher's entropy (nats)",
    }
    with figure(theme, height=3.0, columns=3) as (made, axes):
        for place, (kind, title) in enumerate(titles.items()):
            tables = {name: verdict["retention"][name][kind] for name in _students(verdict)}
            _over_bins(axes[place], tables, "agreed")
            axes[place].set_xlabel(title)
            axes[place].sharey(axes[0])
            axes[place].tick_params(labelleft=place == 0)
        axes[0].set_ylabel("top-1 agreement (%)")
        heights = known(y for each in axes for line in each.lines for y in line.get_ydata())
        axes[0].set_ylim(0, 1.06 * max([1.0, *heights]))
        handles, labels = axes[0].get_legend_handles_labels()
        made.legend(
            handles, labels, frameon=False, labelcolor=THEMES[theme]["text"], ncols=3, loc="outside upper center"
        )
    return made


def calibration(verdict, theme="light"):
    """How often each model's likeliest token is right, against how likely it said that was; on the diagonal it knows what
    it knows.
    """
    with figure(theme, height=3.4) as (made, axes):
        ink = THEMES[theme]["text"]
        axes.plot([0, 100], [0, 100], color=ink, lw=1, ls="--")
        for name in [*_students(verdict), "teacher"]:
            sums = (verdict["retention"][name] or {}).get("confidence")
            if sums:
                used = [i for i, num in enumerate(sums["num"]) if num]
                sure, right = (
                    [100 * number(sums[which][i]) / sums["num"][i] for i in used] for which in ("confidence", "right")
                )
                error = f"{NAMES[name]}: off by {written(verdict['calibration_error'][name], '.1%')}"
                axes.plot(sure, right, color=COLOURS[name], lw=1.6, marker="o", ms=4, label=error)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_xlabel("how likely the model said its token was (%)")
        axes.set_ylabel("how often it was right (%)")
        legend(axes, theme, ncols=2)
    return made


def alignment(inside, theme="light"):
    """How much of the training text gets signal, and how many tokens the pieces have that both tokenizations delimit."""
    with figure(theme, height=3.0, columns=2) as (made, (left, right)):
        counts = numbers(inside["coverage"])
        width = 100 / len(counts)
        left.bar([width * (i + 0.5) for i in range(len(counts))], counts, width=0.9 * width, color=COLOURS["teacher"])
        left.set_xlim(0, 100)
        left.set_xlabel("common positions (%)")
        left.set_ylabel("training windows")
        names = [*map(str, range(1, len(inside["sizes"]))), f"{len(inside['sizes'])}+"]
        _grid(right, [numbers(row, 100) for row in inside["sizes"]], "{:.1f}")
        right.set_xticks(range(len(names)), names)
        right.set_yticks(range(len(names)), names)
        right.set_xlabel("the teacher's tokens in a piece")
        right.set_ylabel("the student's tokens")
        right.set_title("share of the pieces (%)", fontsize=10)
    return made


def attention_maps(inside, theme="light"):
    """Where teacher and students look from each piece of one held-out sentence; heads and layers averaged."""
    names = [name for name in ("teacher", "ce_only", "distilled") if name in inside["attention"]]
    pieces = [_visible("".join(span["student"])) for span in inside["spans"]]
    with figure(theme, height=3.0, columns=len(names)) as (made, axes):
        for place, (name, each) in enumerate(zip(names, _all(axes), strict=True)):
            rows = inside["attention"][name]
            seen = [[x**0.5 if x else math.nan for x in row] for row in rows]  # what is yet to come has no colour
            each.imshow(seen, cmap=SHADES, vmin=0, vmax=1)
            each.set_title(NAMES[name], fontsize=10)
            each.grid(visible=False)
            labels = pieces[1 : len(rows) + 1]
            each.set_yticks(range(len(labels)), labels if place == 0 else [""] * len(labels), fontsize=6)
            each.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90)
            each.tick_params(length=0)
        _all(axes)[0].set_ylabel("from here")
        made.supxlabel("to there (brighter: more attention, by its square root)", fontsize=10)
    return made


def layer_similarity(inside, theme="light"):
    """How alike each layer of the student and of the teacher see the same held-out positions (`internals.cka`)."""
    names = [name for name in ("student_before", "ce_only", "distilled") if name in inside["similarity"]]
    tallest = max(len(inside["similarity"][name]) for name in names)
    with figure(theme, height=1.6 + min(3.0, 0.35 * tallest), columns=len(names)) as (made, axes):
        for place, (name, each) in enumerate(zip(names, _all(axes), strict=True)):
            image = _grid(each, [numbers(row) for row in inside["similarity"][name]], "{:.2f}", top=1.0)
            each.set_title(NAMES[name], fontsize=10)
            rows, columns = len(inside["similarity"][name]), len(inside["similarity"][name][0])
            each.set_yticks(_few(rows), [i + 1 for i in _few(rows)] if place == 0 else [""] * len(_few(rows)))
            each.set_xticks(_few(columns), [i + 1 for i in _few(columns)])
        _all(axes)[0].set_ylabel("the student's layer")
        made.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
        made.supxlabel("the teacher's layer   (1: alike up to rotation and scale, 0: unrelated)", fontsize=10)
    return made


def _students(verdict):
    return [name for name in ("student_before", "ce_only", "distilled") if verdict["retention"][name]]


def _over_bins(axes, tables, name):
    """Means of a sum over the bins that hold anything, each student a line."""
    if not tables:
        return
    first = next(iter(tables.values()))
    used = [i for i, num in enumerate(first["num"]) if num]
    for student, sums in tables.items():
        values = [100 * number(sums[name][i]) / (sums["num"][i] or math.nan) for i in used]
        axes.plot(range(len(used)), values, color=COLOURS[student], lw=1.8, marker="o", ms=4, label=NAMES[student])
    axes.set_xticks(range(len(used)), [_short(first["from"][i]) for i in used], fontsize=9)


def _short(bound):
    """0.5, 10, 1k: the beginning of a bin."""
    return f"{bound / 1000:g}k" if (bound or 0) >= 1000 else written(bound, "g")


def _grid(axes, rows, form, top=None):
    """Numbers as shades, written out where there is room."""
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
    """A piece as a label: line ends and spaces can be seen."""
    return text.strip(" ").replace("\n", "\u21b5") or "\u2423"


def _few(count):
    """Ticks that have room: at most seven of them."""
    return list(range(0, count, max(1, -(-count // 7))))


def _all(axes):
    """The axes of a figure as a list, one or several."""
    return list(axes.flat) if hasattr(axes, "flat") else [axes]
