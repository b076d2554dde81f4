"""What an examination found, and how that is shown: as text, as a Markdown table, as plain values for JSON."""

import dataclasses
import math
import textwrap

STATES = ("ok", "note", "wrong")
GROUPS = {"machine": "Machine", "pair": "Pair", "memory": "Memory", "sessions": "Speed and sessions"}
WIDTH = 118


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `value` is for people, `number` the same for programs (seconds, bytes, fractions), where
    it is one. `state`: `ok`; `note`, it works and is good to know; `wrong`, it will not work, and `remedy` says what will.
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
        assert self.remedy or self.state != "wrong", f"{self.name} is wrong and no remedy is told"


def overall_state(findings):
    """The state of the whole: that of its worst finding."""
    return max((finding.state for finding in findings), key=STATES.index, default="ok")


def to_json(findings):
    """`{"state": ..., "machine": [{name, value, number, state, meaning, remedy}, ...], "pair": ...}`."""
    made = {"state": overall_state(findings), **{group: [] for group in GROUPS}}
    for finding in findings:
        told = dataclasses.asdict(finding)
        if told["number"] is not None and not math.isfinite(told["number"]):
            told["number"] = None  # JSON has no word for it
        made[told.pop("group")].append(told)
    return made


def text(findings):
    """Findings in aligned lines by group, each with what it means and the remedy below, and a last line that sums up."""
    width = max((len(finding.name) for finding in findings), default=0)
    indent = " " * (width + 11)
    lines = []
    for group, title in GROUPS.items():
        chosen = [finding for finding in findings if finding.group == group]
        lines += ["", title] if chosen else []
        for finding in chosen:
            lines += _wrapped(finding.value, f"  {finding.state:5}  {finding.name:{width}}  ", indent)
            lines += _wrapped(finding.meaning, indent, indent)
            lines += _wrapped(finding.remedy and f"Remedy: {finding.remedy}", indent, indent)
    return "\n".join([*lines[1:], "", sentence(findings)])


def markdown(findings):
    """The same as a Markdown table and a line below it."""
    rows = ["| | looked at | found | what it means |", "|---|---|---|---|"]
    for group, title in GROUPS.items():
        chosen = [finding for finding in findings if finding.group == group]
        rows += [f"| | **{title}** | | |"] if chosen else []
        for finding in chosen:
            remedy = finding.remedy and f"**Remedy:** {finding.remedy}"
            told = " ".join(filter(None, (finding.meaning, remedy)))
            state = finding.state if finding.state == "ok" else f"**{finding.state}**"
            rows.append("| " + " | ".join(map(_cell, (state, finding.name, finding.value, told))) + " |")
    return "\n".join([*rows, "", sentence(findings)])


def sentence(findings):
    """What it comes to, in one line."""
    named = {state: [f.name for f in findings if f.state == state] for state in STATES}
    if named["wrong"]:
        return f"This will not work yet: {', '.join(named['wrong'])}. The remedies stand beside."
    if named["note"]:
        return f"This works. Good to know: {', '.join(named['note'])}."
    return "This works."


def _wrapped(said, first, later):
    return textwrap.wrap(
        said, WIDTH, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def _cell(said):
    return said.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
