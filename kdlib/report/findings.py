"""Findings of `kdlib doctor`, and their formats: plain text, a Markdown table, and JSON."""

import dataclasses
import functools
import math
import textwrap

STATES = ("ok", "warning", "error")
GROUPS = {"machine": "Machine", "pair": "Pair", "memory": "Memory", "sessions": "Speed and sessions"}
WIDTH = 118
CELL_ESCAPES = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "&lt;", "\n": " "})
"""Characters of a text in a cell of a Markdown table."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one check. `number` is the `value` for programs, in seconds, bytes or as a fraction. Training works
    despite a `warning`, but not with an `error`: its `remedy` names what to change.
    """

    group: str
    name: str
    value: str
    state: str = "ok"
    meaning: str = ""
    remedy: str = ""
    number: float | None = None

    def __post_init__(self):
        assert self.group in GROUPS and self.state in STATES, (self.group, self.state)
        assert self.remedy or self.state != "error", f"{self.name} is an error without a remedy"


class Findings(list):
    """`Finding`s that a notebook shows as a table."""

    def __repr__(self):
        return text(self)

    def _repr_markdown_(self):
        return markdown(self)


def overall_state(findings):
    """Returns the worst state among the findings."""
    return max((finding.state for finding in findings), key=STATES.index, default="ok")


def to_json(findings):
    """Returns `{"state": ..., "machine": [{name, value, number, state, meaning, remedy}, ...], "pair": ...}`."""
    report = {"state": overall_state(findings), **{group: [] for group in GROUPS}}
    for finding in findings:
        fields = dataclasses.asdict(finding)
        if fields["number"] is not None and not math.isfinite(fields["number"]):
            fields["number"] = None  # JSON has no infinity
        report[fields.pop("group")].append(fields)
    return report


def text(findings):
    """Returns the findings as aligned lines by group, with meanings and remedies, and a summary line."""
    width = max((len(finding.name) for finding in findings), default=0)
    indent = " " * (width + 13)
    options = {"break_long_words": False, "break_on_hyphens": False}
    wrap, lines = functools.partial(textwrap.wrap, width=WIDTH, subsequent_indent=indent, **options), []
    for title, members in _by_title(findings):
        lines += ["", title]
        for finding in members:
            lines += wrap(finding.value, initial_indent=f"  {finding.state:7}  {finding.name:{width}}  ")
            lines += wrap(finding.meaning, initial_indent=indent)
            lines += wrap(finding.remedy and f"Remedy: {finding.remedy}", initial_indent=indent)
    return "\n".join([*lines[1:], "", sentence(findings)])


def markdown(findings):
    """Returns the findings as a Markdown table, and a summary line."""
    rows = ["| | check | result | meaning |", "|---|---|---|---|"]
    for title, members in _by_title(findings):
        rows.append(f"| | **{title}** | | |")
        for finding in members:
            remedy = finding.remedy and f"**Remedy:** {finding.remedy}"
            meaning = " ".join(filter(None, (finding.meaning, remedy)))
            state = finding.state if finding.state == "ok" else f"**{finding.state}**"
            cells = [cell.translate(CELL_ESCAPES) for cell in (state, finding.name, finding.value, meaning)]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([*rows, "", sentence(findings)])


def sentence(findings):
    """Returns the overall result in one line."""
    names = {state: ", ".join(f.name for f in findings if f.state == state) for state in STATES}
    if names["error"]:
        return f"This will not work yet: {names['error']}. Apply the remedies above."
    return f"This works, with warnings: {names['warning']}." if names["warning"] else "This works."


def _by_title(findings):
    groups = ((title, [f for f in findings if f.group == group]) for group, title in GROUPS.items())
    return [(title, members) for title, members in groups if members]
