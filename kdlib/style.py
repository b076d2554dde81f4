"""The look of every figure: one style, for light and dark pages. Colours after Okabe and Ito, safe for colour-blind eyes."""

import contextlib
import io

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
