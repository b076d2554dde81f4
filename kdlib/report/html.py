"""Self-contained HTML report of a run, for small and large screens, light and dark."""

import base64
import html
import json
import os
from pathlib import Path

import numpy as np

from kdlib import files
from kdlib.clock import format_duration
from kdlib.files import read_json_or_empty, read_records, write_text
from kdlib.report import charts, figures
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
"""Colours of consecutive spans, transparent for light and dark pages."""


class Run:
    """Content of a run folder at any stage of the run. Missing or incomplete files are empty (`verdict`: None).

    `status`, `config`, `env`, `verdict` and `inside` are dicts, `records` is the list of dicts in `records.jsonl`. Raises
    ValueError if the folder holds no run.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.status, self.config, self.env, verdict, self.inside = (
            read_json_or_empty(self.path / name)
            for name in ("status.json", "config.json", "env.json", "verdict.json", "figures/inside.json")
        )
        self.data = read_json_or_empty(self.path / "data.json")
        self.verdict, records = verdict or None, self.path / "records.jsonl"
        if "kd_method" not in self.config and "state" not in self.status and not records.exists():
            raise ValueError(f"{path} is not a run folder: it has no config.json, status.json or records.jsonl")
        self.records = read_records(records)

    @property
    def state(self):
        """The state, progress and reason in one line."""
        status, progress = self.status, []
        if "step" in status and "max_steps" in status:
            progress.append(f"step {written(status['step'], '')} of {written(status['max_steps'], '')}")
        if "sessions" in status:
            progress.append(f"session {written(status['sessions'], '')}")
        state = status.get("state") or "started, status.json cannot be read"
        return ", ".join(filter(None, [state, *progress, status.get("reason")]))

    @property
    def figures(self):
        """Names of the figures that this run has data for."""
        return sorted(_select_figures(self.records, self.verdict, self.inside))

    def plot(self, name, theme="light"):
        """Returns the figure `name` (one of `figures`), which a notebook shows as a PNG. `theme`: light or dark."""
        plots = _select_figures(self.records, self.verdict, self.inside)
        if name not in plots:
            raise ValueError(f"no figure {name!r} for this run; available: {', '.join(sorted(plots))}")
        function, data = plots[name]
        return function(data, theme)

    @property
    def spans(self):
        """`AlignedSpans` of held-out text, or None before the run is complete."""
        return AlignedSpans(self.inside["spans"]) if "spans" in self.inside else None

    def report(self):
        """Writes `report.html` and its figures, and returns the report's path."""
        return write_report(self.path)


def plot_runs(runs, name="learning_curves", theme="light"):
    """Returns one figure of several `Run`s, `{title: run}`: `learning_curves`, or the `gains` of complete ones."""
    if name == "gains":
        return charts.gains({title: run.verdict for title, run in runs.items() if run.verdict}, theme)
    if name == "learning_curves":
        return figures.compared({title: run.records for title, run in runs.items()}, theme)
    raise ValueError(f"no figure {name!r} of several runs; available: gains, learning_curves")


class AlignedSpans(list):
    """Spans of `internals.spans`. A notebook shows them as coloured text of both tokenizations."""

    def __repr__(self):
        return f"{len(self)} spans"

    def _repr_html_(self):
        return aligned(self)


def write_report(path):
    """Writes `report.html` and `figures/*.png` from the files of a run folder, and returns the report's path.

    A read-only folder stays unchanged: the files go to the working directory. Raises ValueError if there is no run.
    """
    run = Run(path)
    out = run.path if os.access(run.path, os.W_OK) else Path.cwd()
    plots = _select_figures(run.records, run.verdict, run.inside)
    images = {name: _draw(out / "figures", name, *plot) for name, plot in plots.items()}
    write_text(out / "report.html", _page(run, images))
    return out / "report.html"


def _select_figures(records, verdict, inside):
    """Returns `{name: (function, data)}` for every figure that has data."""
    optional = {
        "sessions": any(record["kind"] == "train" for record in records),
        "gradient_shares": figures.measured(records, "grad_shares"),
        "routing": figures.measured(records, "figures", "routing_0"),
        "averaging": figures.has_averages(records),
    }
    from_records = ["learning_curves", "loss_shares", "memory", "throughput"]
    from_records += [name for name, has_data in optional.items() if has_data]
    from_verdict = ["gain", "bits_per_byte", "agreement", "calibration"] if verdict else []
    from_inside = ["alignment"] if "coverage" in inside else []
    if inside.get("similarity") and "without" not in inside:
        from_inside += ["attention_maps", "layer_similarity"]
    return {
        **{name: (getattr(figures, name), records) for name in from_records},
        **{name: (getattr(charts, name), verdict) for name in from_verdict},
        **{name: (getattr(charts, name), inside) for name in from_inside},
    }


def _draw(folder, name, plot, data):
    """Writes one figure as PNGs of both themes, and returns the HTML that shows the one of the reader's theme."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {}
    for theme, suffix in (("light", ""), ("dark", "-dark")):
        image = plot(data, theme).png()
        with files.atomic(folder / f"{name}{suffix}.png") as temporary:
            temporary.write_bytes(image)
        sources[theme] = "data:image/png;base64," + base64.b64encode(image).decode()
    return (
        f'<picture><source srcset="{sources["dark"]}" media="(prefers-color-scheme: dark)">'
        f'<img src="{sources["light"]}" alt="{name.replace("_", " ")}"></picture>'
    )


SECTIONS = {
    "Test scores": ("bits_per_byte",),
    "Learning curves": ("learning_curves", "averaging"),
    "Loss terms": ("loss_shares", "gradient_shares", "routing"),
    "Alignment of the two tokenizers": ("alignment",),
    "Agreement with the teacher": ("agreement", "calibration"),
    "Inside the models": ("attention_maps", "layer_similarity"),
    "Machine and sessions": ("sessions", "memory", "throughput"),
}
"""Figures of each section after the verdict."""
CAPTIONS = {
    "learning_curves": "Both students start from the same weights. Training time includes the teacher's.",
    "averaging": "Above 0 the averaged weights are better than the weights themselves.",
    "loss_shares": "Top: each term's contribution to the loss. Bottom: its share of the total.",
    "gradient_shares": "Each term's share of the gradient norm at the student's last hidden state.",
    "routing": "The router's mean weights of the tapped teacher layers.",
    "alignment": "Left: the share of a window's positions where both tokenizations end at the same byte, so that the "
    "teacher has a signal. Right: the number of tokens between two such positions.",
    "agreement": "How often student and teacher have the same most likely token. There is no agreement on a teacher "
    "token that is missing in the student's vocabulary.",
    "calibration": "On the diagonal, accuracy equals confidence. Below it, a model is overconfident.",
    "attention_maps": "Each row is a distribution over the preceding spans, averaged over heads and layers. Special "
    "tokens at the start of a text are excluded.",
    "layer_similarity": "Similarity of layer outputs. The control shows the effect of plain training.",
    "sessions": "Training time only, without the start and end of a session.",
    "memory": "The predicted peak is within a training step; memory in use is measured after it.",
    "throughput": "Padding of the student's rows and of the teacher's rows both cost time.",
}


def _page(run, images):
    verdict, inside = run.verdict, run.inside
    title = verdict["sentence"] if verdict else _state_title(run)
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="soft">{html.escape(_subtitle(run))}</p>']
    if verdict:
        if known([verdict["gain"]]):
            marks = "; vertical marks are single runs" if (verdict["num_runs"] or 1) > 1 else ""
            parts.append(_figure(images["gain"], f"Mean gain with its 95 % interval{marks}."))
        else:
            parts.append(f"<figure>{images['bits_per_byte']}</figure>")
        parts += ["<h2>What to trust, and what not</h2>", _trust(verdict, run)]
    for head, names in SECTIONS.items():
        section = [_figure(images[name], CAPTIONS.get(name, "")) for name in names if name in images]
        if section:
            parts += [f"<h2>{head}</h2>", *_opening(names, verdict, inside), *section]
    if verdict and verdict["samples"]:
        parts += ["<h2>Samples</h2>", *_samples(verdict["samples"], verdict.get("recut") or {})]
    parts += ["<h2>Settings</h2>", _settings(run.config, run.env)]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title[:80])}</title><style>{CSS}</style></head><body>\n{body}\n</body></html>\n"
    )


def _opening(names, verdict, inside):
    """Yields the HTML before a section's figures."""
    if "bits_per_byte" in names:
        yield _table(verdict)
    if "alignment" in names and "spans" in inside:
        yield f'<div class="wide">{aligned(inside["spans"])}</div>'


def aligned(spans):
    """Returns HTML of both tokenizations in `internals.spans`: a colour per common span, | between its tokens."""
    lines = []
    for side in ("student", "teacher"):
        parts = []
        for i, span in enumerate(spans):
            text = "|".join(token.replace(" ", "\u00b7").replace("\n", "\u21b5") for token in span[side])
            colour = SPAN_COLOURS[i % len(SPAN_COLOURS)]
            style = f"background:{colour};border-radius:3px;padding:1px 2px;margin-right:3px"
            parts.append(f'<span style="{style}">{html.escape(text)}</span>')
        lines.append(
            f'<div style="line-height:1.9;margin:.3rem 0"><b>{side}</b><br><code style="background:none">'
            + "<wbr>".join(parts)
            + "</code></div>"
        )
    return "".join(lines)


def _state_title(run):
    """Returns the state of a run without a verdict, and the reason."""
    state, reason = run.status.get("state") or "started", run.status.get("reason")
    if not run.status:
        reason = "Its status.json cannot be read"
    if state == "complete":
        reason = "Its verdict.json cannot be read"
    is_trained = any(record["kind"] == "train" for record in run.records)
    return f"The run is {state}." + (f" {reason}." if reason else "") + ("" if is_trained else " No step was trained.")


def _subtitle(run):
    names = [Path(str(run.config.get(key) or "unknown").rstrip("/")).name for key in ("teacher", "student", "dataset")]
    step, last, seconds = (run.status.get(name) for name in ("step", "max_steps", "elapsed_s"))
    steps = f"{written(step, '')} of {written(last, '')} steps, {_format_seconds(seconds)}"
    return "Teacher {}, student {}, text {}; {}.".format(*names, steps)


def _format_seconds(seconds):
    return format_duration(seconds) if known([seconds]) else "unknown time"


def _figure(image, caption):
    caption = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{caption}</figure>"


def _table(verdict):
    heads = ["", "bits per byte", "perplexity", "KL to teacher (nats)", "top-1 agreement"]
    rows = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for name in ("teacher", "student_before", "ce_only", "distilled"):
        metrics = [verdict[key][name] for key in ("bits_per_byte", "perplexity", "kl_to_teacher", "top1_agreement")]
        if verdict["retention"][name] or known(metrics):
            forms = (".4f", ".2f", ".3f", ".1%")
            cells = [NAMES[name], *(written(value, form) for value, form in zip(metrics, forms, strict=True))]
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    note = "Perplexity is per token of each model's tokenizer. Compare bits per byte, not perplexity."
    return f'<div class="wide"><table>{"".join(rows)}</table></div><p class="soft">{note}</p>'


def _samples(samples, recut):
    shares = ", ".join(f"{NAMES[name]} {written(share, '.1%')}" for name, share in recut.items())
    if shares:
        yield (
            f"<p>Generated tokens that differ from the tokenizer's own segmentation: {html.escape(shares)}. "
            "A rising share shows that the teacher teaches its own segmentation.</p>"
        )
    yield f'<div class="sample"><b>prompt (held-out text)</b>{html.escape(samples["opening"])}</div>'
    for name in ("teacher", "student_before", "ce_only", "distilled"):
        if name in samples:
            text = samples[name] if samples[name].strip() else "(white space only)"
            yield f'<div class="sample"><b>{NAMES[name]}</b>{html.escape(text)}</div>'


def _trust(verdict, run):
    alignment, records, inside = verdict["alignment"], run.records, run.inside
    signal = known(r["figures"].get("kd_positions") for r in records if r.get("figures"))
    signal_text = f"; {np.mean(signal):.0%} had a teacher signal, including positions inside tokens" if signal else ""
    coverage, of_student, of_teacher = (
        written(alignment[name], ".0%") for name in ("coverage", "shared_student", "shared_teacher")
    )
    lines = [
        f"{coverage} of the student's tokens are at aligned positions{signal_text}.",
        f"{of_student} of the student's vocabulary and {of_teacher} of the teacher's are shared byte strings.",
        f"The test text was not used in training: {written(verdict['num_documents'], '')} documents, "
        f"{written(verdict['num_bytes'], ',')} bytes. The best weights were chosen on validation documents.",
    ]
    for key, report in run.data.items():
        skipped = ", ".join(f"{written(entry['count'], ',')} {reason}" for reason, entry in report["skipped"].items())
        lines += [f"Records of {key} that were skipped: {skipped}."] if skipped else []
        lines += filter(None, (report["choice"], report["cut"]))
    if verdict["control"] == "off":
        lines.append("No control was trained, so the numbers do not show whether distillation beat plain training.")
    if verdict["control"] == "short":
        lines.append(
            "The control was short: gain and interval compare both students at a tenth of the plan. The table and bars "
            "show the distilled student at its end and the control at that tenth; their difference is not a gain."
        )
    if verdict["num_runs"] == 1:
        lines.append("One pair of runs: the interval covers the choice of documents, not the variation between seeds.")
    if "ce_only" in verdict["train_s"]:
        seconds, steps = verdict["train_s"], verdict["steps"]
        lines.append(
            f"In the first pair, the control had {written(steps['ce_only'], '')} steps in "
            f"{_format_seconds(seconds['ce_only'])}, the distilled student {written(steps['distilled'], '')} in "
            f"{_format_seconds(seconds['distilled'])}. The step counts follow from timing both kinds of step before."
        )
    if verdict.get("read_s"):
        lines.append(
            f"The teacher's pass over the text before training took {_format_seconds(verdict['read_s'])}; each "
            "distilled step includes its share. KL to the teacher is over top tokens and a tail bucket: a lower bound."
        )
    for side in ("student", "teacher"):
        for share in known([alignment[f"faithful_{side}"]]):
            if share < 1.0:
                lines.append(
                    f"The {side}'s tokenizer changes the text: only {share:.1%} of its tokens match the original "
                    "bytes. The others have no teacher signal."
                )
    if "without" in inside:
        lines.append(f"No analysis of the models: {inside['without']}.")
    for alert in (record for record in records if record["kind"] == "alert"):
        name, step = NAMES[alert["run"]], written(alert["step"], "")
        lines.append(f"Alert, {name}, step {step}: {alert['meaning']}. What to try: {alert['advice']}.")
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _settings(config, env):
    text = html.escape(json.dumps({**config, "machine": env}, indent=1))
    return f'<details><summary>All settings and versions</summary><div class="sample">{text}</div></details>'
