"""The live panel: what it shows and what it costs, without a kernel (that is `test_front.py`)."""

import itertools
import json
import types

import pytest
from test_resume import state_of

from kdlib.config import Config
from kdlib.report import html
from kdlib.report import panel as live_panel
from kdlib.session import session


class Hand:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.time = 100.0

    def now(self):
        return self.time


def train(step, run="distilled", repeat=0, **changes):
    return {
        "kind": "train", "run": run, "repeat": repeat, "step": step, "elapsed_s": 0.5 * step, "loss": 3.0 + 1 / step,
        "parts": {"lm": 2.0, "kd": 1.0}, "shares": {"lm": 0.4, "kd": 0.6}, "weights": {"lm": 1.0, "kd": 1.0}, "lr": 1e-3,
        "grad_norm": 1.0, "num_tokens": 100, "figures": {}, "skipped": "",
        "grad_shares": {"lm": 0.3, "kd": 0.7} if step % 10 == 0 else None,
        "micro_batch": 2, "last_step": 1000, "tokens_per_s": 200.0, "left_s": 1000.0 - step,
        "memory": {"used_bytes": 3 * 2**30, "total_bytes": 16 * 2**30, "predicted_bytes": 4 * 2**30}, **changes,
    }  # fmt: skip


def scored(step, run="distilled", **changes):
    score = {"bits_per_byte": 2.0 - step / 1000, "perplexity": 9.0, "kl_to_teacher": 1.0, "top1_agreement": 0.5}
    at = {"kind": "eval", "run": run, "repeat": 0, "step": step, "elapsed_s": 0.5 * step, "split": "validation"}
    return {**at, "averaged": False, "progress": step / 1000, **score, **changes}


START = {"kind": "start", "session": 1, "resumed": None, "step": 0, "session_s": 3600.0, "session_left_s": 3500.0}
ALERT = {
    "kind": "alert", "run": "distilled", "repeat": 0, "step": 40, "sign": "dominance", "part": "kd",
    "meaning": "kd makes up 93% of the <loss>", "advice": "lower kd_weight",
}  # fmt: skip
PLAN = {"kind": "plan", "left_s": 7200.0, "sessions_needed": 3, "finish": "2026-12-01 10:00"}
PAUSED = {"kind": "paused", "reason": "asked to pause; resumes from step-00000040", "step": 40}


class Drawn(bytes):
    """A picture that was drawn for nothing."""

    def png(self):
        return self


@pytest.fixture
def shown(monkeypatch):
    """What was displayed."""
    things = []
    monkeypatch.setattr(live_panel, "show", things.append)
    return things


@pytest.fixture
def hand():
    return Hand()


@pytest.fixture
def drawn(monkeypatch, hand):
    """How many figures were drawn, for nothing: an empty one takes 0.1 s by the clock, any other 0.25 s."""
    made = []

    def draw(found):
        made.append(len(found))
        hand.time += 0.25 if found else 0.1
        return Drawn(b"\x89PNG")

    monkeypatch.setattr(live_panel, "live_figure", draw)
    return made


@pytest.fixture
def front_end(monkeypatch):
    monkeypatch.setattr(live_panel, "has_front_end", lambda: True)


@pytest.fixture
def panel(shown, hand, drawn, front_end):
    return live_panel.LivePanel(clock=hand)


def drive(panel, hand, found, step_s=1.0):
    for record in found:
        hand.time += step_s
        panel.update(record)


def page(panel):
    return " ".join((panel.widgets.head.value + panel.widgets.alerts.value).split())


def test_it_tells_where_the_run_is(panel, hand):
    drive(panel, hand, [START, scored(0, "teacher"), scored(0)])
    drive(panel, hand, [*map(train, range(1, 41)), scored(40), PLAN, ALERT, train(41)])
    text = page(panel)
    for told in (
        "<b>distilled</b>", "step 41 of 1,000", "loss 3.024 nats", "best 1.9600 bits per byte (step 40)", "200 tokens/s",
        "15 min 59 s left", "sessions in total: 3; done 2026-12-01 10:00", "57 min 34 s left of 1 h 00 min",
        "kd makes up 93% of the &lt;loss&gt;", "lower kd_weight",
    ):  # fmt: skip
        assert told in text
    assert "value='0.0410'" in text
    assert panel.problem is None


def test_a_session_without_an_end_has_no_bar_of_its_own(panel, hand):
    drive(
        panel, hand, [{**START, "session_s": float("inf"), "session_left_s": float("inf")}, *map(train, range(1, 20))]
    )
    assert "this session" not in page(panel)
    assert "entire plan" in page(panel)


def test_it_says_how_to_pause(shown, panel):
    assert "interrupt this cell" in shown[0].children[2].value


@pytest.mark.parametrize(("text_s", "figure_s", "step_s"), [(0.002, 0.3, 0.01), (0.02, 2.0, 0.5), (0.001, 0.1, 20.0)])
def test_it_takes_less_than_a_hundredth_of_the_time(shown, hand, front_end, monkeypatch, text_s, figure_s, step_s):
    """At any time, by a clock on which text and figures take what the test says, the tenth of each three times as long."""
    counts = {"text": 0, "figure": 0}

    def takes(kind, seconds):
        counts[kind] += 1
        hand.time += seconds * (3 if counts[kind] % 10 == 0 else 1)
        return Drawn(b"")

    monkeypatch.setattr(live_panel.Widgets, "show_text", lambda *_: takes("text", text_s))
    monkeypatch.setattr(live_panel, "live_figure", lambda found: takes("figure", figure_s if found else 0.5 * figure_s))
    panel, opened, spent_s, shares = live_panel.LivePanel(clock=hand), hand.time, 0.0, []
    for step in range(1, 20_001):
        hand.time += step_s
        started = hand.time
        panel.update(train(step))
        spent_s += hand.time - started
        shares.append(spent_s / (hand.time - opened))
        if hand.time > 10_000:
            break
    assert 0 < max(shares) < 0.01
    passed = hand.time - opened
    assert counts["text"] > min(20, 0.0007 * passed / text_s)
    assert counts["figure"] > min(20, 0.003 * passed / figure_s)


def test_what_a_figure_takes_does_not_grow_with_the_run(panel, hand):
    panel.figure.share = 0.0
    drive(panel, hand, map(train, range(1, 10_001)))
    rows = panel.history.trained["distilled", 0]
    assert 700 <= len(rows) <= live_panel.MAX_RECORDS + 1
    assert (rows[0]["step"], rows[-1]["step"]) == (8, 10_000)
    assert {b["step"] - a["step"] for a, b in itertools.pairwise(rows)} == {8}


def test_no_new_figure_without_new_records(panel, hand, drawn):
    drive(panel, hand, map(train, range(1, 200)))
    num = len(drawn)
    assert num > 2
    drive(panel, hand, [PLAN] * 5, step_s=1000.0)
    assert len(drawn) == num + 1
    assert drawn[-1] == 199


def test_what_was_drawn_is_on_the_page(panel, hand):
    assert panel.widgets.picture.layout.display == "none"
    drive(panel, hand, map(train, range(1, 200)))
    assert panel.widgets.picture.value == b"\x89PNG"
    assert panel.widgets.picture.layout.display is None


NONSENSE = [
    {},
    None,
    {"kind": "train"},
    {"kind": "eval", "split": 3},
    train(1, last_step="no"),
    {"kind": "start"},
    "word",
]


@pytest.mark.parametrize("record", NONSENSE, ids=map(str, range(len(NONSENSE))))
def test_nonsense_never_throws_and_is_told_at_the_end(panel, hand, record):
    drive(panel, hand, [START, *map(train, range(1, 10)), record, *map(train, range(10, 100))])
    assert panel.problem is not None
    with pytest.warns(UserWarning, match="the panel stopped, the run did not: ") as told:
        assert panel.close() is None
    assert len(told) == 1
    assert "\n" not in str(told[0].message)


def test_a_widget_that_fails_never_throws(shown, hand, drawn, front_end, monkeypatch):
    panel = live_panel.LivePanel(clock=hand)
    monkeypatch.setattr(panel.widgets, "show_text", lambda *_: 1 / 0)
    drive(panel, hand, map(train, range(1, 30)))
    with pytest.warns(UserWarning, match="ZeroDivisionError: division by zero"):
        panel.close()


def test_where_no_widget_can_be_made_the_figure_comes_at_the_end(shown, hand, drawn, front_end, monkeypatch):
    monkeypatch.setattr(live_panel, "Widgets", lambda *_: 1 / 0)
    panel = live_panel.LivePanel(clock=hand)
    drive(panel, hand, [*map(train, range(1, 30)), {}])
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert panel.close() == b"\x89PNG"
    assert drawn == [29]


def test_an_interrupt_is_not_swallowed(panel, hand, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(panel.widgets, "show_text", interrupted)
    panel.text.share = 1.0
    with pytest.raises(KeyboardInterrupt):
        drive(panel, hand, [train(1)])


def test_without_a_front_end_there_is_one_figure_at_the_end(shown, hand, drawn, monkeypatch):
    """In a notebook it is displayed, elsewhere it is given back; until then nothing is shown and nothing is drawn."""
    panel = live_panel.LivePanel(clock=hand)
    drive(panel, hand, [START, *map(train, range(1, 200)), ALERT, PLAN, PAUSED])
    assert (drawn, shown, panel.widgets) == ([], [], None)
    assert panel.close() == b"\x89PNG"
    assert panel.close() is None
    monkeypatch.setattr(live_panel, "kernel", lambda: object())
    monkeypatch.setattr(live_panel, "has_front_end", lambda: False)
    panel = live_panel.LivePanel(clock=hand)
    drive(panel, hand, map(train, range(1, 20)))
    assert panel.close() is None
    assert [thing[:4] for thing in shown] == [b"\x89PNG"]
    assert live_panel.LivePanel(clock=hand).close() is None
    assert len(shown) == 1


def test_close_leaves_the_last_state(shown, hand, drawn, front_end):
    with live_panel.LivePanel(clock=hand) as panel:
        drive(panel, hand, [START, *map(train, range(1, 20))])
        assert not panel.widgets.picture.value
        panel.update(PAUSED)
    assert "<b>Paused:</b> asked to pause; resumes from step-00000040" in page(panel)
    assert panel.widgets.picture.value[:4] == b"\x89PNG"
    assert len(shown) == 1


def test_earlier_sessions_are_in_the_picture(shown, hand, tmp_path):
    lines = [*map(train, range(1, 11)), scored(10)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panel = live_panel.LivePanel(tmp_path, hand)
    drive(panel, hand, [{**START, "resumed": "step-00000010"}, train(11)])
    assert [r["step"] for r in panel.history.all()] == [10, *range(1, 12)]


STAGES = {
    "nothing": [],
    "one step": [train(1)],
    "the teacher alone": [scored(0, "teacher")],
    "two steps": [scored(0, "teacher"), scored(0), train(1), train(2)],
    "steps without a number": [train(1, loss=None, skipped="no number"), train(2, loss=None, skipped="no number")],
    "no memory": [train(n, memory={"used_bytes": None, "total_bytes": 1, "predicted_bytes": None}) for n in (1, 2)],
    "no prediction": [train(n, memory={"used_bytes": 1, "total_bytes": 2, "predicted_bytes": None}) for n in (1, 2)],
    "the control": [*map(train, range(1, 30)), *(train(n, "ce_only") for n in range(1, 9)), scored(8, "ce_only")],
    "only the control": [train(n, "ce_only", shares={"lm": 1.0}) for n in range(1, 9)],
    "a second student": [*map(train, range(1, 30)), train(1, repeat=1), train(2, repeat=1)],
    "a part that joins": [train(1), train(2), train(3, shares={"lm": 0.2, "kd": 0.3, "layerwise": 0.5})],
    "evaluations alone": [scored(0), scored(5), *map(train, range(1, 8))],
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_figure_at_any_stage(stage):
    made = live_panel.live_figure(STAGES[stage], "dark" if stage == "evaluations alone" else "light")
    assert made.png()[:4] == b"\x89PNG"
    assert all(axes.get_title(loc="left") and axes.get_xlabel() and axes.get_ylabel() for axes in made.axes)


def test_the_figure_shows_the_values():
    found = [*map(train, range(1, 31)), *(train(n, "ce_only") for n in range(1, 9)), scored(0, "teacher"), scored(0)]
    found += [scored(10), scored(20), scored(5, "ce_only")]
    loss, shares, gradient, curves, memory, rate = live_panel.live_figure(found).axes
    tops = [max(path.get_extents().y1 for path in stack.get_paths()) for stack in loss.collections[:2]]
    assert tops == pytest.approx([0.4 * 4.0, 4.0])
    assert [stack.get_paths()[0].get_extents().y1 for stack in shares.collections] == pytest.approx([40.0, 100.0])
    assert [list(line.get_ydata()) for line in gradient.get_lines()] == [pytest.approx([p] * 3) for p in (30, 70)]
    lines = {tuple(line.get_ydata()): line for line in curves.get_lines()}
    assert (2.0, 1.99, 1.98) in lines
    assert [line.get_ydata()[0] for line in memory.get_lines()] == [3.0, 4.0, 16.0]
    assert memory.get_lines()[0].get_xdata()[-1] == pytest.approx(15.0 + 4.0)
    assert {len(line.get_ydata()): line.get_ydata()[0] for line in rate.get_lines()} == {8: 1.0, 30: 1.0}


def test_a_second_student_is_the_one_that_is_shown():
    loss, *_ = live_panel.live_figure([*map(train, range(1, 31)), *(train(n, repeat=1) for n in range(1, 6))]).axes
    assert {path.get_extents().x1 for stack in loss.collections[:2] for path in stack.get_paths()} == {5.0}
    assert len(loss.collections[0].get_paths()[0].vertices) < 20


def kernel(allow_stdin):
    return types.SimpleNamespace(get_parent=lambda channel: {"content": {"allow_stdin": allow_stdin}})


@pytest.mark.parametrize(("found", "batch", "seen"), [
    (None, "", False), (kernel(True), "", True), (kernel(False), "", False), (kernel(True), "Batch", False),
    (kernel(True), "Interactive", True), (types.SimpleNamespace(get_parent=lambda channel: {}), "", False),
])  # fmt: skip
def test_who_may_answer_sits_in_front(monkeypatch, found, batch, seen):
    monkeypatch.setattr(live_panel, "kernel", lambda: found)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", batch) if batch else None
    assert live_panel.has_front_end() == seen


def test_a_panel_changes_nothing_of_a_run(settings, tmp_path, shown, hand, drawn, monkeypatch):
    monkeypatch.setattr(html, "write_report", lambda folder: None)
    for name in ("watched", "alone"):
        monkeypatch.setattr(live_panel, "has_front_end", lambda name=name: name == "watched")
        plan = Config.from_dict({**settings, "max_steps": 6, "eval_steps": 4, "control": "off"})
        panel = live_panel.LivePanel(tmp_path / name, hand)
        assert bool(panel.widgets) == (name == "watched")
        for record in session.distill(plan, tmp_path / name, on_progress=panel.progress):
            hand.time += 10.0
            panel.update(record)
        panel.close()
        assert panel.problem is None
    assert state_of(tmp_path / "watched") == state_of(tmp_path / "alone")
