"""The panel: what it shows and what it costs, without a browser (that is `test_lab.py`)."""

import itertools
import json
import types

import pytest
from test_resume import state_of

from kdlib import files
from kdlib.config import Config
from kdlib.report import html, live_figure, live_panel, terminal
from kdlib.session import session


class Hand:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.time = 100.0

    def now(self):
        return self.time


class Somebody:
    """A front end that clicks what it is told to, when it is read."""

    def __init__(self, can_read=True):
        self.can_read, self.clicks, self.num_read = can_read, [], 0

    def read(self):
        self.num_read += 1
        while self.clicks:
            self.clicks.pop(0).click()


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
    monkeypatch.setattr(terminal, "show", things.append)
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
def panel(shown, hand, drawn):
    return live_panel.LivePanel(clock=hand, front_end=Somebody())


def drive(panel, hand, found, step_s=1.0):
    for record in found:
        hand.time += step_s
        panel.update(record)


def page(panel):
    return panel.widgets.head.value + panel.widgets.notice.value + panel.widgets.alerts.value


def test_it_tells_where_the_run_is(panel, hand):
    drive(panel, hand, [START, scored(0, "teacher"), scored(0)])
    drive(panel, hand, [*map(train, range(1, 41)), scored(40), PLAN, ALERT, scored(41, asked=True), train(41)])
    text = page(panel)
    for told in (
        "<b>distilled</b>", "step 41 of 1,000", "loss 3.024 nats", "best 1.9600 bits per byte (step 40)", "200 tokens/s",
        "15 min 59 s left", "sessions in total: 3; done 2026-12-01 10:00", "57 min 33 s left of 1 h 00 min",
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


def test_a_click_is_a_wish_and_its_button_rests_until_it_is_fulfilled(panel, hand):
    buttons = panel.widgets.buttons
    assert [button.description for button in buttons.values()] == ["Pause and save", "Save now", "Evaluate now"]
    assert all(button.disabled for button in buttons.values())
    drive(panel, hand, [START, *map(train, range(1, 20))])
    assert not any(button.disabled for button in buttons.values())
    for wish, button in buttons.items():
        panel.front_end.clicks.append(button)
        drive(panel, hand, [train(20)])
        assert panel.wishes == {wish}
        assert [other for other in buttons if buttons[other].disabled] == [wish]
        panel.wishes.clear()
    answer = {"kind": "wish", "wish": "save", "answer": "saved as step-00000020", "step": 20}
    drive(panel, hand, [answer, *map(train, range(20, 25))])
    assert "step 20: saved as step-00000020" in page(panel)
    answer = {"kind": "wish", "wish": "evaluate", "answer": "evaluated on request", "step": 22}
    drive(panel, hand, [scored(22, asked=True), answer, *map(train, range(25, 35))])
    assert "step 22: 1.9780 bits per byte, on request" in page(panel)


def test_where_clicks_are_not_heard_there_are_no_buttons(shown, hand, drawn):
    panel = live_panel.LivePanel(clock=hand, front_end=Somebody(can_read=False))
    assert panel.widgets.buttons == {}
    drive(panel, hand, [START, *map(train, range(1, 20))])
    assert "interrupt this cell" in page(panel)


def test_clicks_are_read_five_times_a_second(panel, hand):
    drive(panel, hand, map(train, range(1, 101)), step_s=0.05)
    assert 20 <= panel.front_end.num_read <= 27


def test_whoever_looks_for_a_wish_has_the_clicks_read(panel, hand):
    """A run looks between two steps; records may be rarer."""
    drive(panel, hand, map(train, range(1, 20)))
    panel.front_end.clicks.append(panel.widgets.buttons["pause"])
    assert "pause" not in panel.wishes
    hand.time += 0.3
    assert "pause" in panel.wishes
    assert panel.widgets.buttons["pause"].disabled
    panel.close()
    panel.front_end.clicks.append(panel.widgets.buttons["save"])
    hand.time += 0.3
    assert "save" not in panel.wishes


@pytest.mark.parametrize(("text_s", "figure_s", "step_s"), [(0.002, 0.3, 0.01), (0.02, 2.0, 0.5), (0.001, 0.1, 20.0)])
def test_it_takes_less_than_a_hundredth_of_the_time(shown, hand, monkeypatch, text_s, figure_s, step_s):
    """At any time, by a clock on which text and figures take what the test says, the tenth of each three times as long."""
    counts = {"text": 0, "figure": 0}

    def takes(kind, seconds):
        counts[kind] += 1
        hand.time += seconds * (3 if counts[kind] % 10 == 0 else 1)
        return Drawn(b"")

    monkeypatch.setattr(live_panel.Widgets, "show_text", lambda *_: takes("text", text_s))
    monkeypatch.setattr(live_panel, "live_figure", lambda found: takes("figure", figure_s if found else 0.5 * figure_s))
    panel, shares = live_panel.LivePanel(clock=hand, front_end=Somebody()), []
    for step in range(1, 20_001):
        hand.time += step_s
        panel.update(train(step))
        shares.append(panel.share)
        if hand.time > 10_000:
            break
    assert 0 < max(shares) < 0.01
    passed = hand.time - panel.opened
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
    panel.front_end.clicks.append(panel.widgets.buttons["pause"])
    drive(panel, hand, map(train, range(100, 104)))
    assert panel.wishes == {"pause"}
    with pytest.warns(UserWarning, match="the panel stopped, the run did not: ") as told:
        assert panel.close() is None
    assert len(told) == 1
    assert "\n" not in str(told[0].message)


def test_a_widget_that_fails_never_throws(shown, hand, drawn, monkeypatch):
    panel = live_panel.LivePanel(clock=hand, front_end=Somebody())
    monkeypatch.setattr(panel.front_end, "read", lambda: 1 / 0)
    drive(panel, hand, map(train, range(1, 30)))
    with pytest.warns(UserWarning, match="ZeroDivisionError: division by zero"):
        panel.close()


def test_where_no_widget_can_be_made_the_figure_comes_at_the_end(shown, hand, drawn, monkeypatch):
    monkeypatch.setattr(live_panel, "Widgets", lambda *_: 1 / 0)
    panel = live_panel.LivePanel(clock=hand, front_end=Somebody())
    drive(panel, hand, [*map(train, range(1, 30)), {}])
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert panel.close() == b"\x89PNG"
    assert drawn == [29]


def test_an_interrupt_is_not_swallowed(panel, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(panel.front_end, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        panel.update(train(1))


def test_without_a_front_end_there_is_one_figure_at_the_end(shown, hand, drawn, monkeypatch):
    """In a notebook it is displayed, elsewhere it is given back; until then nothing is shown and nothing is drawn."""
    panel = live_panel.LivePanel(clock=hand)
    drive(panel, hand, [START, *map(train, range(1, 200)), ALERT, PLAN, PAUSED])
    assert (drawn, shown, panel.widgets) == ([], [], None)
    assert panel.close() == b"\x89PNG"
    assert panel.close() is None
    monkeypatch.setattr(terminal, "kernel", lambda: object())
    panel = live_panel.LivePanel(clock=hand)
    drive(panel, hand, map(train, range(1, 20)))
    assert panel.close() is None
    assert [thing[:4] for thing in shown] == [b"\x89PNG"]
    assert live_panel.LivePanel(clock=hand).close() is None
    assert len(shown) == 1


def test_close_leaves_the_last_state_with_the_buttons_at_rest(shown, hand, drawn):
    with live_panel.LivePanel(clock=hand, front_end=Somebody()) as panel:
        drive(panel, hand, [START, *map(train, range(1, 20))])
        assert not panel.widgets.picture.value
        assert not any(button.disabled for button in panel.widgets.buttons.values())
        panel.update(PAUSED)
    assert "<b>Paused:</b> asked to pause; resumes from step-00000040" in page(panel)
    assert panel.widgets.picture.value[:4] == b"\x89PNG"
    assert all(button.disabled for button in panel.widgets.buttons.values())
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
    "looks": [scored(0), scored(5), scored(7, asked=True), *map(train, range(1, 8))],
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_figure_at_any_stage(stage):
    made = live_figure.live_figure(STAGES[stage], "dark" if stage == "looks" else "light")
    assert made.png()[:4] == b"\x89PNG"
    assert all(axes.get_title(loc="left") and axes.get_xlabel() and axes.get_ylabel() for axes in made.axes)


def test_the_figure_shows_the_values():
    found = [*map(train, range(1, 31)), *(train(n, "ce_only") for n in range(1, 9)), scored(0, "teacher"), scored(0)]
    found += [scored(10), scored(20), scored(25, asked=True), scored(5, "ce_only")]
    loss, shares, gradient, curves, memory, rate = live_figure.live_figure(found).axes
    tops = [max(path.get_extents().y1 for path in stack.get_paths()) for stack in loss.collections[:2]]
    assert tops == pytest.approx([0.4 * 4.0, 4.0])
    assert [stack.get_paths()[0].get_extents().y1 for stack in shares.collections] == pytest.approx([40.0, 100.0])
    assert [list(line.get_ydata()) for line in gradient.get_lines()] == [pytest.approx([p] * 3) for p in (30, 70)]
    lines = {tuple(line.get_ydata()): line for line in curves.get_lines()}
    assert (2.0, 1.99, 1.98) in lines
    assert lines[1.975,].get_markerfacecolor() == "none"
    assert [line.get_ydata()[0] for line in memory.get_lines()] == [3.0, 4.0, 16.0]
    assert memory.get_lines()[0].get_xdata()[-1] == pytest.approx(15.0 + 4.0)
    assert {len(line.get_ydata()): line.get_ydata()[0] for line in rate.get_lines()} == {8: 1.0, 30: 1.0}


def test_a_second_student_is_the_one_that_is_shown():
    loss, *_ = live_figure.live_figure([*map(train, range(1, 31)), *(train(n, repeat=1) for n in range(1, 6))]).axes
    assert {path.get_extents().x1 for stack in loss.collections[:2] for path in stack.get_paths()} == {5.0}
    assert len(loss.collections[0].get_paths()[0].vertices) < 20


class Kernel:
    """As much of a kernel as is looked at."""

    def __init__(self, allow_stdin):
        self._allow_stdin = allow_stdin


@pytest.mark.parametrize(("found", "batch", "seen"), [
    (None, "", False), (Kernel(True), "", True), (Kernel(False), "", False), (Kernel(True), "Batch", False),
    (Kernel(True), "Interactive", True),
])  # fmt: skip
def test_who_may_answer_sits_in_front(monkeypatch, found, batch, seen):
    monkeypatch.setattr(terminal, "kernel", lambda: found)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", batch) if batch else None
    assert (terminal.find_front_end() is not None) == seen
    assert seen is False or not terminal.find_front_end().can_read


class Stream:
    """Messages that wait, and a callback, as a kernel has them."""

    def __init__(self, callback):
        self._recv_callback, self.waiting, self.copy = callback, [], False

    def on_recv(self, callback, copy):
        self._recv_callback, self.copy = callback, copy

    def _run_callback(self, callback, message):
        callback(message)

    def flush(self, flag=3):
        while flag & 1 and self.waiting:
            self._recv_callback(self.waiting.pop(0))


class Speaker(Kernel):
    """A kernel with a stream: what it handled, what it left for later, what it said of its state."""

    def __init__(self):
        super().__init__(True)
        self.handled, self.later, self.states, self.problems = [], [], [], []
        self.shell_channel_thread, self.shell_stream = None, Stream(self.later.append)
        self.shell_handlers = {
            kind: self._handler(kind) for kind in ("comm_msg", "comm_info_request", "execute_request")
        }
        self.session = types.SimpleNamespace(feed_identities=self._fed, deserialize=lambda parts, content, copy: parts)
        self.log = types.SimpleNamespace(exception=self.problems.append)

    def _fed(self, message, copy):
        return [], {"header": {"msg_type": message.split()[0]}, "content": message}

    def _handler(self, kind):
        async def reply(message):
            self.handled.append(message)

        def handle(stream, idents, message):
            if "broken" in message["content"]:
                raise RuntimeError
            if kind == "comm_info_request":
                return reply(message["content"])
            self.handled.append(message["content"])
            return None

        return handle

    def _publish_status(self, state, channel, parent=None):
        self.states.append((state, parent and parent["content"]))


def test_clicks_are_dealt_with_and_all_else_waits_in_its_order():
    kernel = Speaker()
    reader, callback = terminal.FrontEnd(kernel), kernel.shell_stream._recv_callback
    assert reader.can_read
    sent = ["execute_request 1", "comm_msg 2", "complete_request 3", "comm_info_request 4", "execute_request 5"]
    kernel.shell_stream.waiting += sent
    reader.read()
    assert kernel.handled == ["comm_msg 2", "comm_info_request 4"]
    assert kernel.later == ["execute_request 1", "complete_request 3", "execute_request 5"]
    assert kernel.shell_stream._recv_callback == callback
    one = [("busy", "comm_msg 2"), ("idle", "comm_msg 2"), ("busy", None)]
    assert kernel.states == one + [(state, told and "comm_info_request 4") for state, told in one]


def test_a_message_that_breaks_its_handler_stops_nothing():
    kernel = Speaker()
    kernel.shell_stream.waiting += ["comm_msg broken", "execute_request 1", "", "comm_msg 2"]
    terminal.FrontEnd(kernel).read()
    assert (kernel.handled, kernel.later, len(kernel.problems)) == (["comm_msg 2"], ["execute_request 1", ""], 1)


def test_a_panel_changes_nothing_of_a_run(settings, tmp_path, shown, hand, drawn, monkeypatch):
    """With somebody who clicks all the time, and with nobody."""
    monkeypatch.setattr(html, "write_report", lambda folder: None)
    for name, somebody in (("clicked", Somebody()), ("alone", None)):
        plan = Config.from_dict({**settings, "max_steps": 6, "eval_steps": 4, "control": "off"})
        panel = live_panel.LivePanel(tmp_path / name, hand, somebody)
        for record in session.distill(plan, tmp_path / name, wishes=panel.wishes):
            hand.time += 10.0
            if somebody:
                somebody.clicks += [panel.widgets.buttons[wish] for wish in ("save", "evaluate")]
            panel.update(record)
        panel.close()
        assert panel.problem is None
    looks = [r["step"] for r in files.read_records(tmp_path / "clicked" / "records.jsonl") if r.get("asked")]
    assert len(looks) >= 2
    assert state_of(tmp_path / "clicked") == state_of(tmp_path / "alone")
