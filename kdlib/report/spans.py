"""Text that both tokenizers have split, as coloured spans."""

import html

COLOURS = [
    "rgba(0,114,178,.25)", "rgba(230,159,0,.3)", "rgba(0,158,115,.28)", "rgba(204,121,167,.3)", "rgba(86,180,233,.3)",
]  # fmt: skip
"""Colours of consecutive spans, transparent for light and dark pages."""


class AlignedSpans(list):
    """Spans of `internals.spans`. A notebook shows them as coloured text of both tokenizations."""

    def __repr__(self):
        return f"{len(self)} spans"

    def __html__(self):
        """Returns HTML of both tokenizations: a colour per common span, | between its tokens."""
        return "".join(
            f'<div style="line-height:1.9;margin:.3rem 0"><b>{side}</b><br><code style="background:none">'
            + "<wbr>".join(_coloured(span[side], COLOURS[i % len(COLOURS)]) for i, span in enumerate(self))
            + "</code></div>"
            for side in ("student", "teacher")
        )

    _repr_html_ = __html__


def _coloured(tokens, colour):
    text = html.escape("|".join(tokens).replace(" ", "\u00b7").replace("\n", "\u21b5"))
    return f'<span style="background:{colour};border-radius:3px;padding:1px 2px;margin-right:3px">{text}</span>'
