"""The look of every figure: one style, for light and dark pages. Colours after Okabe and Ito, safe for colour-blind eyes."""

import contextlib
import io
import math

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

COLOURS = {"distilled": "#D55E00", "ce_only": "#0072B2", "teacher": "#009E73", "student_before": "#999999"}
PART_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"]
NAMES = {
    "distilled": "distilled",
    "ce_only": "control (plain training)",
    "teacher": "teacher",
    "student_before": "student before",
}
PARTS = ("lm", "kd", "layerwise", "attention_alignment", "attention", "routing_feature", "contrastive")
PART_NAMES = {
    "lm": "next token (lm)",
    "kd": "distillation (kd)",
    "layerwise": "layers (layerwise)",
    "attention_alignment": "attention relations",
    "attention": "attention maps",
    "routing_feature": "routed layers",
    "contrastive": "contrastive",
}
SHADES = "cividis"
"""From little to much."""
THEMES = {
    "light": {"text": "#1a1a1a", "back": "#ffffff", "grid": "#d9d9d9"},
    "dark": {"text": "#e8e8e8", "back": "#14171a", "grid": "#3a3f44"},
}

PLACES = ("repeat", "step", "elapsed_s", "session")
"""Fields of a record that say where it is drawn."""

PALETTE = 256
"""Colours in a PNG: half of the bytes or less, and no difference that can be seen."""


class Picture(Figure):
    """A figure that a notebook shows as a small PNG."""

    def _repr_png_(self):
        return self.png()

    def png(self):
        """The figure as a PNG with few colours, bytes."""
        canvas, file = FigureCanvasAgg(self), io.BytesIO()
        canvas.draw()
        whole = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
        whole.convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE).save(file, "png", optimize=True)
        return file.getvalue()


@contextlib.contextmanager
def figure(theme, height, rows=1, columns=1):
    """A figure 6.6 inches wide in a theme's colours, with its axes; laid out when the block ends."""
    with matplotlib.rc_context(_look(theme)):
        made = Picture(figsize=(6.6, height), dpi=120, layout="constrained")
        yield made, made.subplots(rows, columns)


@contextlib.contextmanager
def sheet(theme, size, rows, columns, dpi, **margins):
    """A figure of `size` inches with many small axes, in a theme's colours. It is laid out by its `margins` alone (those of
    a grid in matplotlib): that takes a third of the time.
    """
    with matplotlib.rc_context({**_look(theme), "font.size": 9, "legend.fontsize": 9, "axes.titlesize": 10}):
        made = Picture(figsize=size, dpi=dpi)
        yield made, made.subplots(rows, columns, gridspec_kw=margins)


def _look(theme):
    """What matplotlib is told of a theme."""
    colours = THEMES[theme]
    return {
        "font.size": 11,
        "text.color": colours["text"],
        "axes.labelcolor": colours["text"],
        "axes.edgecolor": colours["grid"],
        "axes.facecolor": colours["back"],
        "figure.facecolor": colours["back"],
        "xtick.color": colours["text"],
        "ytick.color": colours["text"],
        "grid.color": colours["grid"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.fontsize": 10,
    }


def legend(axes, theme, ncols=3):
    """The names of what is drawn, above the axes, where they hide nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, labelcolor=THEMES[theme]["text"], ncols=ncols, loc="lower left", bbox_to_anchor=(-0.02, 1.0),
            borderaxespad=0.2, columnspacing=1.4, handlelength=1.6,
        )  # fmt: skip


def number(value):
    """A value to draw: NaN, which leaves a gap, where it is null (what NaN and infinity become in JSON) or infinite."""
    return value if value is not None and math.isfinite(value) else math.nan


def numbers(values, scale=1.0):
    """Values to draw, times `scale`."""
    return [scale * number(value) for value in values]


def known(values):
    """Those values that are numbers."""
    return [value for value in map(number, values) if not math.isnan(value)]


def written(value, form):
    """A number as text, by a format; a dash where it is null or no number."""
    return f"{value:{form}}" if known([value]) else "–"


def placed(records):
    """Records that have a place in a figure: none of their `PLACES` is null."""
    return [record for record in records if len(known(record.get(name, 0) for name in PLACES)) == len(PLACES)]


def time_unit(seconds):
    """`(name, its seconds)`, to tell the longest of some times in."""
    longest = max(known(seconds), default=0.0)
    return ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)


def zoom(axes, values):
    """Leave out the fall of the first evaluations, where the end is what matters."""
    values = sorted(known(values))
    if len(values) > 4:
        low, high = values[0], values[int(0.9 * (len(values) - 1))]
        margin = max(0.08 * (high - low), 1e-3)
        axes.set_ylim(low - margin, high + margin)


def smooth(values):
    """A running mean over a fiftieth of the points, so that stacked areas can be read. A gap stays one and no wider."""
    width = max(1, len(values) // 50)
    values, sums, counts = numbers(values), [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (0.0 if math.isnan(value) else value))
        counts.append(counts[-1] + (not math.isnan(value)))
    starts = [max(0, i + 1 - width) for i in range(len(values))]
    means = ((sums[i + 1] - sums[start]) / max(1, counts[i + 1] - counts[start]) for i, start in enumerate(starts))
    return [math.nan if math.isnan(value) else mean for value, mean in zip(values, means, strict=True)]
