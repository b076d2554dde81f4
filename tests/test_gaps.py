"""Files of a run in which numbers are null or files are missing: every reader bears them, at any age of the run."""

import copy
import html
import json
import math
import shutil

import pytest

from kdlib import cli
from kdlib.config import Config
from kdlib.evaluation import scoring, verdict
from kdlib.files import _finite, read_json, read_records, write_json
from kdlib.report import figures, panel
from kdlib.report.html import Run, os, write_report
from kdlib.report.panel import live_figure
from kdlib.session import alerts, arm, run_folder, session

PLOTS = (
    "learning_curves", "loss_shares", "gradient_shares", "routing", "averaging", "memory", "throughput", "sessions",
)  # fmt: skip
OF_VERDICT = ("gain", "bits_per_byte", "agreement", "calibration")
OF_INSIDE = ("alignment", "attention_maps", "layer_similarity")


@pytest.fixture(scope="module")
def run(tmp_path_factory, pair):
    """The folder of a complete run whose records have every field."""
    out = tmp_path_factory.mktemp("run") / "out"
    config = Config(
        teacher=str(pair / "teacher"), student=str(pair / "student"), dataset=str(pair / "text.jsonl"), max_length=48,
        batch_size=2, max_steps=4, eval_steps=2, check_teacher=False, eval_tokens=300, control="full", use_ema=True,
        share_steps=1, routing_feature_weight=0.1, early_stopping_patience=0,
    )  # fmt: skip
    list(session.distill(config, out))
    alert = {"kind": "alert", "run": "distilled", "repeat": 0, "step": 2, "session": 1, "sign": "x", "part": None}
    run_folder.Records(out / "records.jsonl").append({**alert, "meaning": "a sign", "advice": "look"})
    return out


def leaves(value, path=()):
    """Paths of all numbers in plain values."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from leaves(item, (*path, place))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def nulled(value, new=None):
    """The value with every number replaced."""
    value = copy.deepcopy(value)
    for path in list(leaves(value)):
        put(value, path, new)
    return value


def draw_records(found):
    """Every figure of records, the panel, the cockpit and the alerts, as pictures where `png` asks for them."""
    made = [getattr(figures, name)(found) for name in PLOTS]
    made += [figures.compared({"one": found, "two": found}), live_figure(found)]
    seen = panel.History()
    for record in found:
        seen.add(record, 0.0)
        assert "<table>" in panel.TEXTS.status(seen, 1.0)
        if record["kind"] == "alert" and record["sign"] != "teacher_passed":
            assert "a sign" in panel.TEXTS.alerts(seen.alerts[-1:], 4)
    facts = arm.Arm("distilled", 0, 4, 4, 4).to_dict()
    arm.Arm.from_dict(facts, None, found, alerts.AlertMonitor())
    return made


def fields(found):
    """One path of each field of each kind of records."""
    return sorted({(record["kind"], *path) for record in found for path in leaves(record)})


@pytest.mark.parametrize("new", [None, math.nan, math.inf])
def test_every_figure_bears_records_without_a_number(run, new):
    found = read_records(run / "records.jsonl")
    for made in draw_records([nulled(record, new) for record in found]):
        assert made.png()


def test_every_figure_bears_any_field_that_is_null(run):
    """In all records of a kind, and in one alone between others that have it."""
    found = read_records(run / "records.jsonl")
    assert len(fields(found)) > 40
    for kind, *path in fields(found):
        changed = copy.deepcopy(found)
        for record in (record for record in changed if record["kind"] == kind and tuple(path) in leaves(record)):
            put(record, path, None)
        draw_records(changed)
    for kind in ("train", "eval"):
        changed = copy.deepcopy(found)
        number = [i for i, record in enumerate(changed) if record["kind"] == kind][2]
        for path in leaves(found[number]):
            if path[0] not in figures.PLACES:
                put(changed[number], path, None)
        for made in draw_records(changed):
            assert made.png()


def test_a_gap_is_drawn_where_a_number_is_null(run):
    found = read_records(run / "records.jsonl")
    scored = [r for r in found if r["kind"] == "eval" and r["split"] == "validation" and r["run"] == "distilled"]
    scored[0]["bits_per_byte"] = None
    line = next(line for line in figures.learning_curves(found).axes[0].lines if line.get_label() == "distilled")
    drawn = [r["bits_per_byte"] for r in scored if not r["averaged"]]
    assert math.isnan(line.get_ydata()[0]) and list(line.get_ydata()[1:]) == drawn[1:]


def test_a_gap_does_not_spread_through_a_mean():
    means = figures.smooth([1.0, None, 3.0] * 50)
    assert [math.isnan(mean) for mean in means] == [False, True, False] * 50
    assert means[5] == 2.0  # of 1 and 3, the gap between them left out
    assert list(figures.smooth([])) == []


def of_a_verdict(found):
    for name in OF_VERDICT:
        yield getattr(figures, name)(found)
    yield figures.gains({"a": found, "b": found})


def test_every_chart_bears_a_verdict_without_numbers(run):
    found = read_json(run / "verdict.json")
    for new in (None, math.nan, math.inf):
        for made in of_a_verdict(nulled(found, new)):
            assert made.png()
    top = {path[:2] if path[0] in ("interval", "gain_by_run") else path[:3] for path in leaves(found)}
    for start in sorted(top, key=str):
        changed = copy.deepcopy(found)
        for path in leaves(found):
            if path[: len(start)] == start:
                put(changed, path, None)
        list(of_a_verdict(changed))
    endless = {**found, "interval": [-math.inf, math.inf]}  # one document alone
    for made in of_a_verdict(endless), of_a_verdict(json.loads(json.dumps(_finite(endless)))):
        assert all(each.png() for each in made)


def test_every_chart_bears_a_look_inside_without_numbers(run):
    found = read_json(run / "figures" / "inside.json")
    for new in (None, math.nan):
        for name in OF_INSIDE:
            assert getattr(figures, name)(nulled(found, new)).png()


def test_the_page_bears_files_without_numbers(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for name in ("status", "verdict", "config", "env", "figures/inside"):
        path = tmp_path / "run" / f"{name}.json"
        path.write_text(json.dumps(nulled(read_json(path))))
    found = read_records(run / "records.jsonl")
    lines = "".join(json.dumps(nulled(record)) + "\n" for record in found)
    (tmp_path / "run" / "records.jsonl").write_text(lines)
    page = write_report(tmp_path / "run").read_text()
    assert "– of the student's tokens" in page
    assert "<td>–</td>" in page


def test_scores_bear_null(run):
    """What a checkpoint or a cache keeps of a score has null for NaN."""
    score = scoring.Score(2.0, 9.0, 0.5, 0.25, bits := scoring.np.array([8.0, 4.0]), bits / 2)
    kept = json.loads(json.dumps(score.to_dict()))
    found = read_json(run / "verdict.json")
    kept["retention"] = found["retention"]["distilled"]
    for name in ("bits_per_byte", "perplexity", "kl_to_teacher", "top1_agreement", "bits", "retention"):
        torn = scoring.Score.from_dict({**kept, name: nulled(kept[name]) if name in ("bits", "retention") else None})
        named = {
            "teacher": torn,
            "student_before": torn,
            "ce_only": torn,
            "distilled": verdict.mean_score([torn, torn]),
        }
        answer = verdict.make_verdict("full", named, [(torn, torn)] * 2)
        list(of_a_verdict(json.loads(json.dumps(_finite(answer)))))
    assert scoring.Score.from_dict(kept).summary() == score.summary()


AT = {"step": 0, "max_steps": 4, "elapsed_s": 1.0, "sessions": 1}
READ = "the time is up; the teacher cache written so far is kept"
STATES = {
    "begun": ({"state": "running", "reason": "", **AT}, "running. No step was trained."),
    "reading": (
        {"state": "running", "reason": "the teacher reads the text", **AT},
        "running. the teacher reads the text. No step was trained.",
    ),
    "paused": ({"state": "paused", "reason": READ, **AT}, f"paused. {READ}. No step was trained."),
    "failed": (
        {"state": "failed", "reason": "OSError: gone", "step": 0, "max_steps": 0},
        "failed. OSError: gone. No step was trained.",
    ),
    "torn": (None, "started. Its status.json cannot be read. No step was trained."),
}


@pytest.mark.pictures
@pytest.mark.parametrize("files", [(), ("env.json",)])
@pytest.mark.parametrize("name", STATES)
def test_a_run_that_has_not_trained_has_a_page_that_says_so(run, tmp_path, capsys, name, files):
    status, title = STATES[name]
    out = tmp_path / "run"
    out.mkdir()
    for file in ("config.json", *files):
        shutil.copy(run / file, out / file)
    (out / "status.json").write_text(json.dumps(status) if status else '{"state": "run')
    assert cli.main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    page = (out / "report.html").read_text()
    assert f"<h1>The run is {html.escape(title)}</h1>" in page
    assert Run(out).records == []


@pytest.mark.parametrize(
    "missing", ["env.json", "status.json", "config.json", "verdict.json", "records.jsonl", "figures"]
)
def test_a_page_is_written_without_any_one_of_the_files(run, tmp_path, missing):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (shutil.rmtree if missing == "figures" else type(out).unlink)(out / missing)
    page = write_report(out).read_text()
    assert ("What to trust" in page) == (missing != "verdict.json")
    assert (missing == "verdict.json") == ("<h1>The run is complete. Its verdict.json cannot be read.</h1>" in page)


def test_a_page_without_samples_and_looks_is_written(run, tmp_path):
    """The look inside is allowed to fail."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    write_json(out / "figures" / "inside.json", {"without": "the models could not be observed"})
    write_json(out / "verdict.json", {**read_json(out / "verdict.json"), "samples": {}})
    page = write_report(out).read_text()
    assert "No analysis of the models: the models could not be observed." in page
    assert "<h2>Samples" not in page


def test_the_page_shows_texts_of_a_run_as_texts(run, tmp_path):
    out, text = tmp_path / "run", "<b>&{{ 7 * 7 }}"
    shutil.copytree(run, out)
    found = read_json(out / "verdict.json")
    write_json(out / "verdict.json", {**found, "sentence": text, "samples": {"opening": text, "distilled": text}})
    write_json(out / "config.json", {**read_json(out / "config.json"), "teacher": text})
    write_json(out / "data.json", {"dataset": {"skipped": {text: {"count": 1}}, "choice": text, "cut": text}})
    page = write_report(out).read_text()
    assert text not in page and page.count("&lt;b&gt;&amp;{{ 7 * 7 }}") == 9


@pytest.mark.parametrize("content", [None, {}, {"model_type": "llama"}])
def test_a_folder_that_holds_no_run_is_refused_in_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    assert cli.main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"kdlib: {tmp_path} is not a run folder: it has no config.json, status.json or records.jsonl\n"
    )
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_lies_in_a_folder_for_reading_only_is_drawn_elsewhere(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != run)
    before = sorted(run.rglob("*"))
    assert write_report(run) == tmp_path / "report.html"
    assert sorted(run.rglob("*")) == before


def test_a_panel_goes_on_with_a_run_that_has_no_records_yet(tmp_path, monkeypatch):
    opened = panel.LivePanel(tmp_path / "run")
    opened.update({"kind": "start", "resumed": "step-00000000", "session_s": math.inf, "session_left_s": math.inf})
    assert opened.problem is None
