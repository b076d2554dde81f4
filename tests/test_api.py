"""The public interface: what `import kdlib` offers, and what a run folder shows in a notebook."""

import subprocess
import sys

import pytest

import kdlib
from kdlib.report.findings import Finding, Findings
from kdlib.report.spans import AlignedSpans


def test_import_is_light_and_every_public_name_is_there():
    code = "import sys, kdlib; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
    assert all(getattr(kdlib, name) is not None for name in kdlib.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        kdlib.Trainer  # noqa: B018


@pytest.fixture(scope="module")
def run(tmp_path_factory, pair):
    out = tmp_path_factory.mktemp("api") / "run"
    inputs = {"teacher": str(pair / "teacher"), "student": str(pair / "student"), "dataset": str(pair / "text.jsonl")}
    small = {"max_length": 48, "batch_size": 2, "max_steps": 4, "eval_tokens": 300, "check_teacher": False}
    list(kdlib.distill(kdlib.Config(**inputs, **small, control="full"), out))
    return kdlib.Run(out)


def test_a_run_folder_shows_its_figures_and_its_report(run):
    assert run.state.startswith("complete, step 4 of 4")
    assert {"learning_curves", "loss_shares", "gain", "bits_per_byte"} <= set(run.figures)
    for name in run.figures:
        assert run.plot(name)._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"no figure 'loss'.*available: .*loss_shares"):
        run.plot("loss")
    assert run.report() == run.path / "report.html"
    assert "report.html" in {path.name for path in run.path.iterdir()}


def test_runs_are_compared_in_one_figure(run):
    for name in ("learning_curves", "gains"):
        assert kdlib.plot_runs({"one": run, "two": run}, name)._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="available: gains, learning_curves"):
        kdlib.plot_runs({"one": run}, "losses")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        kdlib.Run(tmp_path)


def test_findings_and_spans_show_themselves():
    finding = Finding("machine", "Python", "3.11", "ok", "", "")
    assert "| Python |" in Findings([finding])._repr_markdown_()
    assert "Python" in repr(Findings([finding])) and "Finding(" not in repr(Findings([finding]))
    assert repr(AlignedSpans([{}, {}])) == "2 spans"
    page = AlignedSpans([{"student": ["a<", "b"], "teacher": ["a<b"]}])._repr_html_()
    assert "a&lt;|b" in page and page.count("<span") == 2
