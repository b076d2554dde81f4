"""Figures draw what the records say; the page holds every figure there is."""

import json
import math

import pytest
from matplotlib.colors import to_rgba

from kdlib.config import Config
from kdlib.report import figures
from kdlib.report.html import write_report
from kdlib.report.spans import AlignedSpans
from kdlib.session.session import distill


def train(step, run="distilled", session=1, **changes):
    return {
        "kind": "train", "run": run, "repeat": 0, "step": step, "elapsed_s": 2.0 * step, "session": session, "loss": 3.0,
        "skipped": "", "parts": {"lm": 2.0, "kd": 4.0}, "shares": {"lm": 0.25, "kd": 0.75}, "grad_shares": None,
        "figures": {}, "tokens_per_s": 100.0 * step, "computed_per_token": {"student": 1.5, "teacher": 1.25},
        "memory": {"used_bytes": 2**30 * step, "total_bytes": 16 * 2**30, "predicted_bytes": 5 * 2**30}, **changes,
    }  # fmt: skip


def evaluated(step, bits, run="distilled", averaged=False, session=1):
    return {
        "kind": "eval", "run": run, "repeat": 0, "step": step, "elapsed_s": 2.0 * step, "session": session,
        "averaged": averaged, "split": "validation", "bits_per_byte": bits,
    }  # fmt: skip


def lines(axes):
    return {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines}


def test_averaging_is_what_the_average_saves():
    records = [
        evaluated(10, 2.0),
        evaluated(10, 1.75, averaged=True),
        evaluated(20, 1.5),
        evaluated(20, 1.625, averaged=True),
    ]
    assert lines(figures.averaging(records).axes[0])["distilled"] == [(10, 0.25), (20, -0.125)]


def test_memory_is_in_gib_over_the_time_of_all_students():
    records = [train(1), train(2), train(1, "ce_only"), train(4, "ce_only")]
    axes = figures.memory(records).axes[0]
    drawn = lines(axes)
    assert drawn["in use, distilled"] == [(2.0, 1.0), (4.0, 2.0)]
    assert drawn["in use, control"] == [(6.0, 1.0), (12.0, 4.0)]
    assert axes.get_xlabel() == "training time (seconds)"
    assert drawn["predicted peak"][0][1] == 5.0
    assert drawn["total 16.0 GiB (above)"][0][1] == 16.0
    assert axes.get_ylim()[1] == pytest.approx(5.5)


def test_throughput_shows_speed_and_padding():
    above, below = figures.throughput([train(1), train(2), train(1, "ce_only")]).axes
    assert lines(above)["distilled"] == [(1, 100.0), (2, 200.0)]
    assert lines(below)["the student's"] == [(1, 1.5), (2, 1.5)]
    assert lines(below)["the teacher's"] == [(1, 1.25), (2, 1.25)]


def test_the_timeline_gives_every_session_its_time():
    records = [train(1), evaluated(1, 3.0), train(2, session=2), evaluated(2, 2.0, session=2), train(3, "ce_only", 2)]
    records += [{"kind": "alert", "run": "distilled", "repeat": 0, "step": 1, "session": 1}]
    axes = figures.sessions(records).axes[0]
    bars = [(bar.get_x(), bar.get_width(), round(bar.get_y() + bar.get_height() / 2)) for bar in axes.patches]
    assert bars == [(0.0, 2.0, 0), (2.0, 2.0, 0), (4.0, 6.0, 1)]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["distilled", "control"]
    drawn = lines(axes)
    assert drawn["alert"] == [(2.0, 0)]
    assert drawn["best weights"] == [(4.0, 0)]


def test_agreement_is_drawn_for_the_bins_that_hold_something():
    sums = {"from": [0, 8, 16], "num": [4.0, 0.0, 8.0], "kl": [1.0, 0.0, 1.0], "agreed": [1.0, 0.0, 6.0]}
    told = {"frequency": sums, "position": sums, "entropy": sums}
    verdict = {"retention": {"student_before": told, "distilled": told, "ce_only": None}}
    axes = figures.agreement(verdict).axes[1]
    assert lines(axes)["distilled"] == [(0, 25.0), (1, 75.0)]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "16"]
    assert "control (plain training)" not in lines(axes)


def test_calibration_is_confidence_against_correctness():
    sums = {"from": [0, 0.5], "num": [4.0, 2.0], "confidence": [1.0, 1.5], "right": [2.0, 1.0]}
    verdict = {
        "retention": {"student_before": None, "distilled": {"confidence": sums}, "ce_only": None, "teacher": None}
    }
    verdict["calibration_error"] = {"distilled": 0.25}
    axes = figures.calibration(verdict).axes[0]
    assert lines(axes)["distilled: error 25.0%"] == [(25.0, 50.0), (75.0, 50.0)]


def test_attention_maps_leave_out_what_is_yet_to_come():
    spans = [{"student": [" a"], "teacher": [" a"]}] * 4
    rows = [[1.0, 0.0], [0.75, 0.25]]
    inside = {"spans": spans, "attention": {"teacher": rows, "student_before": rows, "distilled": rows}}
    made = figures.attention_maps(inside)
    assert [axes.get_title() for axes in made.axes] == ["teacher", "distilled"]
    drawn = made.axes[0].images[0].get_array()
    assert drawn[1].tolist() == pytest.approx([math.sqrt(0.75), 0.5])
    assert bool(drawn.mask[0, 1])
    assert not bool(drawn.mask[0, 0])


def test_layer_similarity_has_one_scale():
    inside = {"similarity": {"student_before": [[0.1, 0.2]], "distilled": [[0.5, 0.75]]}}
    made = figures.layer_similarity(inside)
    assert [axes.images[0].get_clim() for axes in made.axes[:2]] == [(0.0, 1.0)] * 2
    assert [text.get_text() for text in made.axes[1].texts] == ["0.50", "0.75"]


def test_alignment_shows_windows_and_sizes():
    left, right = figures.alignment({"coverage": [1, 0, 3, 0], "sizes": [[0.5, 0.25], [0.125, 0.125]]}).axes
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in left.patches] == [
        (12.5, 1), (37.5, 0), (62.5, 3), (87.5, 0),
    ]  # fmt: skip
    assert right.images[0].get_array().tolist() == [[50.0, 25.0], [12.5, 12.5]]


@pytest.mark.parametrize("theme", figures.THEMES)
def test_a_picture_is_a_small_png_in_its_themes_colours(theme):
    made = figures.loss_shares([train(1), train(2)], theme)
    image = made._repr_png_()
    assert image.startswith(b"\x89PNG")
    assert len(image) < 30_000
    assert made.get_facecolor() == pytest.approx(to_rgba(figures.THEMES[theme]["figure.facecolor"]))


@pytest.mark.parametrize(
    "name",
    ["learning_curves", "loss_shares", "gradient_shares", "routing", "averaging", "memory", "throughput", "sessions"],
)
def test_figures_of_a_run_that_has_no_records_yet_are_drawn(name):
    assert getattr(figures, name)([]).png()


def test_pieces_are_coloured_alike_on_both_sides_and_nothing_is_markup():
    spans = [{"student": [" <b", "&"], "teacher": [" <b&"]}, {"student": ["\n"], "teacher": ["\n"]}]
    ours, theirs = AlignedSpans(spans)._repr_html_().split("<b>teacher</b>")
    assert "\u00b7&lt;b|&amp;" in ours
    assert "\u00b7&lt;b&amp;" in theirs
    for colour in ("rgba(0,114,178,.25)", "rgba(230,159,0,.3)"):
        assert ours.count(colour) == theirs.count(colour) == 1
    assert "\u21b5" in ours


@pytest.mark.pictures
def test_the_page_holds_every_figure_after_the_verdict_and_what_to_trust(settings, tmp_path):
    changes = {"use_ema": True, "share_steps": 1, "routing_feature_weight": 0.1, "eval_steps": 2}
    list(distill(Config.from_dict({**settings, **changes}), tmp_path / "run"))
    page = write_report(tmp_path / "run").read_text()
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    made = {path.stem for path in (tmp_path / "run" / "figures").glob("*.png")}
    names = {
        "learning_curves", "loss_shares", "gradient_shares", "routing", "averaging", "memory", "throughput", "sessions",
        "gain", "bits_per_byte", "agreement", "calibration", "alignment", "attention_maps", "layer_similarity",
    }  # fmt: skip
    assert made == names | {f"{name}-dark" for name in names}
    places = [
        page.index(f"<h1>{verdict['sentence'].split('(')[0]}"),
        page.index('alt="gain"'),
        page.index("What to trust"),
    ]
    places += [page.index(f'alt="{name.replace("_", " ")}"') for name in ("bits_per_byte", "alignment", "throughput")]
    assert places == sorted(places)
    assert page.count("data:image/png") == 2 * len(names)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_several_runs_are_compared_over_their_time_with_one_control():
    one = [evaluated(1, 3.0), evaluated(2, 2.0), evaluated(2, 9.0, averaged=True), evaluated(3, 2.5, "ce_only")]
    axes = figures.compared({"a way": one, "another": [evaluated(4, 1.0), evaluated(5, 7.0, "ce_only")]}).axes[0]
    assert lines(axes) == {
        "a way": [(2.0, 3.0), (4.0, 2.0)],
        "another": [(8.0, 1.0)],
        "control (plain training)": [(6.0, 2.5)],
    }
    assert axes.get_xlabel() == "training time (seconds)"


def test_gains_stand_one_under_the_other():
    verdicts = {
        "first": {"gain": 0.5, "interval": [0.25, 0.75], "helped": True},
        "second": {"gain": -0.5, "interval": [-0.75, -0.25], "helped": False},
        "no control": {"gain": None, "interval": None, "helped": None},
    }
    axes = figures.gains(verdicts).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "second"]
    drawn = [list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines[1:]]
    assert drawn == [[(0.25, 0), (0.75, 0)], [(0.5, 0)], [(-0.75, 1), (-0.25, 1)], [(-0.5, 1)]]
    assert axes.lines[1].get_color() != axes.lines[3].get_color()
