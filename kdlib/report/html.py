"""One page that tells what a run came to: self-contained, for phone and laptop, light and dark."""

import base64
import dataclasses
import html
import json
import os
from pathlib import Path

import numpy as np

from kdlib import files
from kdlib.clock import format_duration
from kdlib.files import read_known, read_records, write_text
from kdlib.report import charts
from kdlib.report import figures as plots
from kdlib.report.style import NAMES, known, written

CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --back: #ffffff; --soft: #5b6168; --line: #d9d9d9; --card: #f5f6f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --back: #14171a; --soft: #a3abb3; --line: #3a3f44; --card: #1d2226; }
}
body { margin: 0 auto; max-width: 46rem; padding: 1.2rem; font: 16px/1.55 system-ui, sans-serif; color: var(--ink);
  background: var(--back); }
h1 { font-size: 1.45rem; line-height: 1.3; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.soft, figcaption { color: var(--soft); font-size: .92rem; }
figure { margin: 1rem 0; overflow-x: auto; } img { width: 100%; min-width: 30rem; height: auto; display: block; }
figcaption { position: sticky; left: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.sample { background: var(--card); padding: .7rem .9rem; border-radius: .4rem; margin: .6rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 14px/1.5 ui-monospace, monospace; }
.sample b { display: block; font: 600 .85rem system-ui, sans-serif; color: var(--soft); }
"""


SPAN_COLOURS = [
    "rgba(0,114,178,.25)", "rgba(230,159,0,.3)", "rgba(0,158,115,.28)", "rgba(204,121,167,.3)", "rgba(86,180,233,.3)",
]  # fmt: skip
"""One a piece, in turn; they let light and dark pages shine through."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder holds at any age of the run: what is missing yet, or half written, is empty (`verdict`: None)."""

    path: Path
    status: dict
    config: dict
    env: dict
    records: list
    verdict: dict | None
    inside: dict

    @property
    def state(self):
        """One line: the state, where it is, and why."""
        status, place = self.status, []
        if "step" in status and "max_steps" in status:
            place.append(f"step {written(status['step'], '')} of {written(status['max_steps'], '')}")
        if "sessions" in status:
            place.append(f"session {written(status['sessions'], '')}")
        said = [status.get("state") or "begun, status.json can't be read", *place, status.get("reason")]
        return ", ".join(filter(None, said))


def read_run(path):
    """The `Run` in a folder. Raises ValueError where the folder holds none."""
    path = Path(path)
    told = {name: read_known(path / f"{name}.json") for name in ("status", "config", "env", "verdict")}
    if "kd_method" not in told["config"] and "state" not in told["status"] and not (path / "records.jsonl").exists():
        raise ValueError(f"{path} holds no run: none of config.json, status.json and records.jsonl is there")
    told["verdict"] = told["verdict"] or None
    inside = read_known(path / "figures" / "inside.json")
    return Run(path, **told, records=read_records(path / "records.jsonl"), inside=inside)


def write_report(path):
    """Write `report.html` and `figures/*.png` of a run folder, from its files alone; the report's path. A folder that can't
    be written, as a mounted one, is left as it is: they go to the working folder.

    Raises ValueError where the folder holds no run.
    """
    run = read_run(path)
    out = run.path if os.access(run.path, os.W_OK) else Path.cwd()
    pictures = _pictures(run.records, run.verdict, run.inside)
    drawn = {name: _draw(out / "figures", name, *picture) for name, picture in pictures.items()}
    write_text(out / "report.html", _page(run, drawn))
    return out / "report.html"


def _pictures(found, verdict, inside):
    """`{name: (figure, its content)}`: all that can be drawn of what is there."""
    pictures = {
        name: (getattr(plots, name), found) for name in ("learning_curves", "loss_shares", "memory", "throughput")
    }
    if any(record["kind"] == "train" for record in found):
        pictures["sessions"] = plots.sessions, found
    if plots.measured(found, "grad_shares"):
        pictures["gradient_shares"] = plots.gradient_shares, found
    if plots.measured(found, "figures", "routing_0"):
        pictures["routing"] = plots.routing, found
    if plots.has_averages(found):
        pictures["averaging"] = plots.averaging, found
    if verdict:
        pictures |= {
            name: (getattr(charts, name), verdict) for name in ("gain", "bits_per_byte", "agreement", "calibration")
        }
    if "coverage" in inside:
        pictures["alignment"] = charts.alignment, inside
    if inside.get("similarity") and "without" not in inside:
        pictures |= {name: (getattr(charts, name), inside) for name in ("attention_maps", "layer_similarity")}
    return pictures


def _draw(folder, name, plot, content):
    """Draw one figure in both themes: PNGs in `folder`, and the HTML that shows the fitting one."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {}
    for theme, suffix in (("light", ""), ("dark", "-dark")):
        image = plot(content, theme).png()
        with files.atomic(folder / f"{name}{suffix}.png") as beside:
            beside.write_bytes(image)
        sources[theme] = "data:image/png;base64," + base64.b64encode(image).decode()
    return (
        f'<picture><source srcset="{sources["dark"]}" media="(prefers-color-scheme: dark)">'
        f'<img src="{sources["light"]}" alt="{name.replace("_", " ")}"></picture>'
    )


SECTIONS = {
    "How much each model knows": ("bits_per_byte",),
    "Learning over time": ("learning_curves", "averaging"),
    "What the student learned from": ("loss_shares", "gradient_shares", "routing"),
    "Where the two tokenizers meet": ("alignment",),
    "What was kept of the teacher": ("agreement", "calibration"),
    "A look inside": ("attention_maps", "layer_similarity"),
    "The machine and its sessions": ("sessions", "memory", "throughput"),
}
"""The page's parts after the verdict, with their figures."""
CAPTIONS = {
    "learning_curves": "Both students start from the same weights. Time counts training, with the teacher's part in it.",
    "averaging": "Above 0 the running average of the weights knows more than the weights themselves.",
    "loss_shares": "Above: what each part adds to the loss. Below: its share of the whole.",
    "gradient_shares": "What really competes: how hard each part pulls where it touches the student.",
    "routing": "Which teacher layers the student's states chose to learn from.",
    "alignment": "Left: the share of a window's positions where both have read the same bytes, and the teacher can say "
    "something. Right: how many tokens stand between two such positions.",
    "agreement": "How often the student finds the same token likeliest as its teacher. A token of the teacher's that the "
    "student does not have can't be agreed with.",
    "calibration": "On the diagonal a model is right as often as it says. Below it, too sure of itself.",
    "attention_maps": "Each row is a distribution over what was read before; all heads and layers averaged. Marks at the "
    "beginning of a text are left out.",
    "layer_similarity": "Whether layers see the same positions alike. The control tells what training on text alone does.",
    "sessions": "Training time only; what a session needs to start and to end is left out.",
    "memory": "What was foretold is the peak of a training step; in use is what the machine counts after it.",
    "throughput": "Both kinds of padding cost time: the student's rows and the teacher's.",
}


def _page(run, drawn):
    verdict, inside, found = run.verdict, run.inside, run.records
    title = verdict["sentence"] if verdict else _standing(run)
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="soft">{html.escape(_subtitle(run))}</p>']
    if verdict:
        if known([verdict["gain"]]):
            marks = "; the upright marks are single runs" if (verdict["num_runs"] or 1) > 1 else ""
            parts.append(_figure(drawn["gain"], f"The interval is what this run can vouch for{marks}."))
        else:
            parts.append(f"<figure>{drawn['bits_per_byte']}</figure>")
        parts += ["<h2>What to trust, and what not</h2>", _trust(verdict, found, inside)]
    for head, names in SECTIONS.items():
        shown = [_figure(drawn[name], CAPTIONS.get(name, "")) for name in names if name in drawn]
        if shown:
            parts += [f"<h2>{head}</h2>", *_opening(head, verdict, inside), *shown]
    if verdict and verdict["samples"]:
        parts += ["<h2>What they write</h2>", *_samples(verdict["samples"], verdict.get("recut") or {})]
    parts += ["<h2>Settings</h2>", _settings(run.config, run.env)]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title[:80])}</title><style>{CSS}</style></head><body>\n{body}\n</body></html>\n"
    )


def _opening(head, verdict, inside):
    """What stands above a section's figures."""
    if head == "How much each model knows":
        yield _table(verdict)
    if head == "Where the two tokenizers meet" and "spans" in inside:
        yield f'<div class="wide">{aligned(inside["spans"])}</div>'


def aligned(spans):
    """HTML of a text as both tokenizers read it (`internals.spans`): a piece that both delimit has one colour, | stands
    between the tokens within it.
    """
    lines = []
    for side in ("student", "teacher"):
        pieces = []
        for place, span in enumerate(spans):
            text = "|".join(token.replace(" ", "\u00b7").replace("\n", "\u21b5") for token in span[side])
            colour = SPAN_COLOURS[place % len(SPAN_COLOURS)]
            style = f"background:{colour};border-radius:3px;padding:1px 2px;margin-right:3px"
            pieces.append(f'<span style="{style}">{html.escape(text)}</span>')
        lines.append(
            f'<div style="line-height:1.9;margin:.3rem 0"><b>{side}</b><br><code style="background:none">'
            + "<wbr>".join(pieces)
            + "</code></div>"
        )
    return "".join(lines)


def _standing(run):
    """The state of a run that has no verdict and why, as far as its files say."""
    state, reason = run.status.get("state") or "begun", run.status.get("reason")
    if not run.status:
        reason = "Its status.json can't be read"
    if state == "complete":
        reason = "Its verdict.json can't be read"
    trained = any(record["kind"] == "train" for record in run.records)
    return (
        f"The run is {state}" + (f". {reason}." if reason else ".") + ("" if trained else " Nothing was trained yet.")
    )


def _subtitle(run):
    named = {name: str(run.config.get(name) or "unknown").rstrip("/") for name in ("teacher", "student", "dataset")}
    names = f"Teacher {Path(named['teacher']).name}, student {Path(named['student']).name}"
    step, last, seconds = (run.status.get(name) for name in ("step", "max_steps", "elapsed_s"))
    steps = f"{written(step, '')} of {written(last, '')} steps, {_spoken(seconds)}"
    return f"{names}, text {Path(named['dataset']).name}; {steps}."


def _spoken(seconds):
    return format_duration(seconds) if known([seconds]) else "unknown time"


def _figure(picture, caption):
    told = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{picture}{told}</figure>"


def _table(verdict):
    heads = ["", "bits per byte", "perplexity", "KL to teacher (nats)", "top-1 agreement"]
    rows = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for name in ("teacher", "student_before", "ce_only", "distilled"):
        figures = [verdict[key][name] for key in ("bits_per_byte", "perplexity", "kl_to_teacher", "top1_agreement")]
        if verdict["retention"][name] or known(figures):
            forms = (".4f", ".2f", ".3f", ".1%")
            cells = [NAMES[name], *(written(figure, form) for figure, form in zip(figures, forms, strict=True))]
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    note = "Perplexity counts each model's own tokens: compare bits per byte across tokenizers, not perplexities."
    return f'<div class="wide"><table>{"".join(rows)}</table></div><p class="soft">{note}</p>'


def _samples(samples, recut):
    shares = ", ".join(f"{NAMES[name]} {written(share, '.1%')}" for name, share in recut.items())
    if shares:
        yield (
            f"<p>Tokens that the tokenizer would cut otherwise, in the text that each student wrote: {html.escape(shares)}. "
            "A teacher with another tokenizer may teach its own cuts; then the share rises.</p>"
        )
    yield f'<div class="sample"><b>held-out text begins</b>{html.escape(samples["opening"])}</div>'
    for name in ("teacher", "student_before", "ce_only", "distilled"):
        if name in samples:
            text = samples[name] if samples[name].strip() else "(white space only)"
            yield f'<div class="sample"><b>{NAMES[name]}</b>{html.escape(text)}</div>'


def _trust(verdict, found, inside):
    told = verdict["alignment"]
    signal = known(r["figures"].get("kd_positions") for r in found if r.get("figures"))
    more = (
        f"; {np.mean(signal):.0%} got teacher signal, the others inside tokens" if signal else " and got teacher signal"
    )
    coverage, ours, theirs = (written(told[name], ".0%") for name in ("coverage", "shared_student", "shared_teacher"))
    lines = [
        f"{coverage} of the student's tokens lie where the two tokenizations meet{more}.",
        f"{ours} of the student's vocabulary and {theirs} of the teacher's are the same byte strings.",
        f"The test text was seen by nobody: {written(verdict['num_documents'], '')} documents, "
        f"{written(verdict['num_bytes'], ',')} bytes. The best weights of each run were chosen on other documents "
        "(validation).",
    ]
    if verdict["control"] == "off":
        lines.append(
            "No control was trained, so the numbers do not tell whether distillation did better than training."
        )
    if verdict["control"] == "short":
        lines.append(
            "The control was short: gain and interval compare both students at a tenth of the plan. The table and the bars "
            "show the distilled student at its end beside the control at that tenth; do not read their difference as a gain."
        )
    if verdict["num_runs"] == 1:
        lines.append("One pair of runs: the interval covers the choice of documents, not the luck of a seed.")
    if "ce_only" in verdict["train_s"]:
        seconds, steps = verdict["train_s"], verdict["steps"]
        lines.append(
            f"The control had {written(steps['ce_only'], '')} steps in {_spoken(seconds['ce_only'])}, the distilled student "
            f"{written(steps['distilled'], '')} in {_spoken(seconds['distilled'])} (of the first pair; the number was fixed "
            "beforehand by timing both kinds of step in turn)."
        )
    if verdict.get("read_s"):
        lines.append(
            f"The teacher read the text once, before training, in {_spoken(verdict['read_s'])}; each distilled step is "
            "counted with its share of that. KL to the teacher is over its likeliest tokens and a tail: a lower bound."
        )
    for side in ("student", "teacher"):
        if any(share < 1.0 for share in known([told[f"faithful_{side}"]])):
            lines.append(
                f"The {side}'s tokenizer changes the text: only {told[f'faithful_{side}']:.1%} of its tokens are the bytes "
                "that stand there; the others give and take no signal."
            )
    if "without" in inside:
        lines.append(f"No look inside the models: {inside['without']}.")
    for alert in (record for record in found if record["kind"] == "alert"):
        name = NAMES[alert["run"]]
        lines.append(
            f"Alert, {name}, step {written(alert['step'], '')}: {alert['meaning']}. What to try: {alert['advice']}."
        )
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _settings(config, env):
    shown = json.dumps({**config, "machine": env}, indent=1)
    return (
        f'<details><summary>Every setting and version</summary><div class="sample">{html.escape(shown)}</div></details>'
    )
