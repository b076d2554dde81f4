"""Common style of the figures, for light and dark pages, in the colour-blind safe palette of Okabe and Ito."""

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
THEMES = {
    "light": {"text": "#1a1a1a", "back": "#ffffff", "grid": "#d9d9d9"},
    "dark": {"text": "#e8e8e8", "back": "#14171a", "grid": "#3a3f44"},
}
PLACES = ("repeat", "step", "elapsed_s", "session")
"""Fields of a record that give its position in a figure."""
NUM_COLOURS = 256
"""Colours of a PNG: a palette halves its size without a visible difference."""


class Picture(Figure):
    """Matplotlib figure that a notebook displays as a small PNG."""

    def _repr_png_(self):
        return self.png()

    def png(self):
        """Returns the figure as the bytes of a PNG with `NUM_COLOURS` colours."""
        canvas, file = FigureCanvasAgg(self), io.BytesIO()
        canvas.draw()
        image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
        image.convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(file, "png", optimize=True)
        return file.getvalue()


@contextlib.contextmanager
def figure(theme, height, rows=1, columns=1):
    """Yields a `Picture` 6.6 inches wide and its axes, in the colours of a theme."""
    with matplotlib.rc_context(_rc_params(theme)):
        picture = Picture(figsize=(6.6, height), dpi=120, layout="constrained")
        yield picture, picture.subplots(rows, columns)


@contextlib.contextmanager
def sheet(theme, size, rows, columns, dpi, **margins):
    """Yields a `Picture` of `size` inches with many small axes, in the colours of a theme. Fixed `margins` (of a
    matplotlib grid) render three times as fast as a constrained layout.
    """
    with matplotlib.rc_context({**_rc_params(theme), "font.size": 9, "legend.fontsize": 9, "axes.titlesize": 10}):
        picture = Picture(figsize=size, dpi=dpi)
        yield picture, picture.subplots(rows, columns, gridspec_kw=margins)


def _rc_params(theme):
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
    """Adds a legend above the axes, if anything in them has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, labelcolor=THEMES[theme]["text"], ncols=ncols, loc="lower left", bbox_to_anchor=(-0.02, 1.0),
            borderaxespad=0.2, columnspacing=1.4, handlelength=1.6,
        )  # fmt: skip


def number(value):
    """Returns a value to draw: NaN, which leaves a gap, for null (NaN or infinity in JSON) and infinity."""
    return value if value is not None and math.isfinite(value) else math.nan


def numbers(values, scale=1.0):
    """Returns values to draw, multiplied by `scale`."""
    return [scale * number(value) for value in values]


def known(values):
    """Returns the values that are finite numbers."""
    return [value for value in map(number, values) if not math.isnan(value)]


def written(value, form):
    """Formats a number; null and non-finite values become a dash."""
    return f"{value:{form}}" if known([value]) else "–"


def placed(records):
    """Returns the records that can be drawn: none of their `PLACES` is null."""
    return [record for record in records if len(known(record.get(name, 0) for name in PLACES)) == len(PLACES)]


def time_unit(seconds):
    """Returns `(name, seconds)` of a unit that suits the longest of some times."""
    longest = max(known(seconds), default=0.0)
    return ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)


def zoom(axes, values):
    """Limits the y axis to the later values, so that a steep start does not flatten them."""
    values = sorted(known(values))
    if len(values) > 4:
        low, high = values[0], values[int(0.9 * (len(values) - 1))]
        margin = max(0.08 * (high - low), 1e-3)
        axes.set_ylim(low - margin, high + margin)


def smooth(values):
    """Returns the running mean over a fiftieth of the points. A gap (NaN) stays a gap and does not spread."""
    width = max(1, len(values) // 50)
    values, sums, counts = numbers(values), [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (0.0 if math.isnan(value) else value))
        counts.append(counts[-1] + (not math.isnan(value)))
    starts = [max(0, i + 1 - width) for i in range(len(values))]
    means = ((sums[i + 1] - sums[start]) / max(1, counts[i + 1] - counts[start]) for i, start in enumerate(starts))
    return [math.nan if math.isnan(value) else mean for value, mean in zip(values, means, strict=True)]
