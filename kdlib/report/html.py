"""A run folder, and its self-contained HTML report for small and large screens, light and dark."""

import base64
import functools
import json
import os
import statistics
from pathlib import Path

import jinja2

from kdlib import files
from kdlib.clock import format_duration
from kdlib.report import figures
from kdlib.report.figures import NAMES, known, written
from kdlib.report.spans import AlignedSpans

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, autoescape=True,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
TEMPLATES.globals["NAMES"] = NAMES
TEMPLATES.filters |= {"written": written, "duration": format_duration}
TEMPLATES.tests["known"] = lambda value: bool(known([value]))


class Run:
    """Content of a run folder at any stage of the run. Missing or incomplete files are empty (`verdict`: None).

    `status`, `config`, `env`, `verdict`, `inside` and `data` are dicts, `records` is the list of dicts in `records.jsonl`.
    Raises ValueError if the folder holds no run.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.status, self.config, self.env, verdict, self.inside, self.data = (
            files.read_json_or_empty(self.path / f"{name}.json")
            for name in ("status", "config", "env", "verdict", "figures/inside", "data")
        )
        self.verdict, records = verdict or None, self.path / "records.jsonl"
        if "kd_method" not in self.config and "state" not in self.status and not records.exists():
            raise ValueError(f"{path} is not a run folder: it has no config.json, status.json or records.jsonl")
        self.records = files.read_records(records)

    @property
    def state(self):
        """The state, progress and reason in one line."""
        status, progress = self.status, []
        if "step" in status and "max_steps" in status:
            progress.append(f"step {written(status['step'])} of {written(status['max_steps'])}")
        if "sessions" in status:
            progress.append(f"session {written(status['sessions'])}")
        state = status.get("state") or "started, status.json cannot be read"
        return ", ".join(filter(None, [state, *progress, status.get("reason")]))

    @property
    def title(self):
        """The verdict in one sentence, or the state of a run without a verdict and the reason."""
        if self.verdict:
            return self.verdict["sentence"]
        state, reason = self.status.get("state") or "started", self.status.get("reason")
        if not self.status:
            reason = "Its status.json cannot be read"
        if state == "complete":
            reason = "Its verdict.json cannot be read"
        is_trained = any(record["kind"] == "train" for record in self.records)
        return f"The run is {state}." + (f" {reason}." if reason else "") + " No step was trained." * (not is_trained)

    @property
    def figures(self):
        """Names of the figures that this run has data for."""
        return sorted(self._data_by_figure)

    def plot(self, name, theme="light"):
        """Returns the figure `name` (one of `figures`), which a notebook shows as a PNG. `theme`: light or dark."""
        if name not in self.figures:
            raise ValueError(f"no figure {name!r} for this run; available: {', '.join(self.figures)}")
        return getattr(figures, name)(self._data_by_figure[name], theme)

    @functools.cached_property
    def _data_by_figure(self):
        distilled = figures.select(self.records, "train", **figures.DISTILLED)
        scored = [r for r in self.records if r["kind"] == "eval" and r["split"] == "validation"]
        has_data = {
            "sessions": any(r["kind"] == "train" for r in self.records),
            "gradient_shares": any(r["grad_shares"] for r in distilled),
            "routing": any("routing_0" in r["figures"] for r in distilled),
            "averaging": any(r.get("averaged") for r in scored),
        }
        from_records = ["learning_curves", "loss_shares", "memory", "throughput", *filter(has_data.get, has_data)]
        from_verdict = ["gain", "bits_per_byte", "agreement", "calibration"] if self.verdict else []
        from_inside = ["alignment"] if "coverage" in self.inside else []
        if self.inside.get("similarity") and "without" not in self.inside:
            from_inside += ["attention_maps", "layer_similarity"]
        sources = (from_records, self.records), (from_verdict, self.verdict), (from_inside, self.inside)
        return {name: data for names, data in sources for name in names}

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
        return figures.gains({title: run.verdict for title, run in runs.items() if run.verdict}, theme)
    if name == "learning_curves":
        return figures.compared({title: run.records for title, run in runs.items()}, theme)
    raise ValueError(f"no figure {name!r} of several runs; available: gains, learning_curves")


def write_report(path):
    """Writes `report.html` and `figures/*.png` from the files of a run folder, and returns the report's path.

    A read-only folder stays unchanged: the files go to the working directory. Raises ValueError if there is no run.
    """
    run = Run(path)
    out = run.path if os.access(run.path, os.W_OK) else Path.cwd()
    images = {name: _draw(out / "figures", name, run) for name in run.figures}
    covered = known(r["figures"].get("kd_positions") for r in run.records if r.get("figures"))
    page = TEMPLATES.get_template("report.html.j2").render(
        run=run, verdict=run.verdict, inside=run.inside, images=images,
        names=[Path(str(run.config.get(key) or "unknown").rstrip("/")).name for key in ("teacher", "student", "dataset")],
        signal=statistics.fmean(covered) if covered else None, alerts=[r for r in run.records if r["kind"] == "alert"],
        settings=json.dumps({**run.config, "machine": run.env}, indent=1),
    )  # fmt: skip
    files.write_text(out / "report.html", page)
    return out / "report.html"


def _draw(folder, name, run):
    """Writes one figure as PNGs of both themes, and returns them in base64 by theme."""
    images = {}
    for theme, suffix in (("light", ""), ("dark", "-dark")):
        image = run.plot(name, theme).png()
        with files.atomic(folder / f"{name}{suffix}.png") as temporary:
            temporary.write_bytes(image)
        images[theme] = base64.b64encode(image).decode()
    return images
