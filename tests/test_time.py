"""Sessions that end in time, by a clock that the test moves: every task takes what the test says."""

import math
import os
import signal
import time

import pytest

from kdlib import clock, environment, files
from kdlib.config import Config
from kdlib.evaluation import scoring
from kdlib.session import checkpoint, experiment, finish, inputs, session, time_budget
from kdlib.training import loop

COSTS = {"load": 45.0, "step": 18.0, "evaluation": 20.0, "save": 8.0, "export": 4.0}


class World:
    """A clock, and how long each kind of task takes by it; `slow(task, number, factor)` makes one of them slower."""

    def __init__(self, monkeypatch, **costs):
        self.time, self.costs, self.odd, self.counts = 1000.0, {**COSTS, **costs}, {}, dict.fromkeys(COSTS, 0)
        for owner, name, task in (
            (inputs, "load", "load"),
            (loop.TrainLoop, "_gradients", "step"),
            (checkpoint, "write", "save"),
            (finish, "write_student", "export"),
        ):
            monkeypatch.setattr(owner, name, self._timed(getattr(owner, name), task))
        real = scoring._Accumulator.add_text

        def part_of_an_evaluation(tally, *given):
            self.spend("evaluation", 0.5)
            return real(tally, *given)

        monkeypatch.setattr(scoring._Accumulator, "add_text", part_of_an_evaluation)
        monkeypatch.setattr(checkpoint.BackgroundWriter, "start", lambda writer, *given: writer._write(given))

    def now(self):
        return self.time

    def slow(self, task, number, factor):
        self.odd[task, number] = factor

    def spend(self, task, share=1.0):
        self.counts[task] += 1
        self.time += self.costs[task] * share * self.odd.get((task, self.counts[task]), 1.0)

    def _timed(self, real, task):
        def call(*given, **named):
            self.spend(task)
            return real(*given, **named)

        return call


@pytest.fixture
def long_run(settings):
    """540 steps of 18 seconds, with an evaluation every 27: three hours. Two batches make an evaluation."""
    return {**settings, "control": "off", "max_steps": 540, "eval_steps": 27, "eval_tokens": 150}


def run(settings, out, world, **changes):
    """One session: its records, and the seconds it took."""
    started = world.now()
    found = list(session.distill(Config.from_dict({**settings, **changes}), out, world))
    return found, world.now() - started


def test_five_sessions_of_forty_minutes_do_what_three_hours_do(long_run, tmp_path, monkeypatch):
    """The same weights, no deadline missed, little time spent saving, and a plan that was right after the first minute."""
    world = World(monkeypatch, step=36.0)
    long_run |= {"max_steps": 260, "eval_steps": 13}
    found, whole_s = run(long_run, tmp_path / "whole", world)
    assert found[-1]["kind"] == "verdict"
    assert 2.8 * 3600 < whole_s < 3.2 * 3600
    sessions, training_s, saving_s = [], 0.0, 0.0
    while True:
        found, took_s = run(long_run, tmp_path / "cut", world, time_budget="40m")
        assert took_s <= 2400.0
        sessions.append(found)
        status = files.read_json(tmp_path / "cut" / "status.json")
        training_s, saving_s = training_s + took_s, saving_s + status["saving_s"]
        if found[-1]["kind"] == "verdict":
            break
        assert status["state"] == found[-1]["kind"] == "paused"
        assert (tmp_path / "cut" / "student" / "model.safetensors").exists()
    assert len(sessions) == 5
    assert saving_s <= 0.03 * training_s
    (told,) = [r for r in sessions[0] if r["kind"] == "plan"]
    at = next(r for r in sessions[0] if r["kind"] == "train" and r["elapsed_s"] >= 60.0)
    assert told["sessions_needed"] == 5
    used_s = at["elapsed_s"] + 45.0 + 2 * 20.0 + 2 * 40.0 + 8.0  # loading, scores before training, a checkpoint
    assert told["left_s"] + used_s == pytest.approx(whole_s, rel=0.1)
    assert [[r["sessions_needed"] for r in found if r["kind"] == "plan"] for found in sessions] == [[5]] * 5
    weights = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    for task, unit in (("tokens_left", 1), ("steps_per_s", 1 / 36.0)):
        assert told[task] > 0.5 * unit


@pytest.mark.parametrize(("task", "factor"), [("step", 5.0), ("evaluation", 4.0), ("save", 7.0), ("export", 10.0)])
def test_the_deadline_is_kept_when_a_task_is_suddenly_slow(long_run, tmp_path, monkeypatch, task, factor):
    """Whichever of the last ones before the deadline it is. What takes too long is broken off or left out."""
    world = World(monkeypatch)
    settings = {**long_run, "time_budget": "20m", "eval_steps": 9}
    run(settings, tmp_path / "usual", world)
    last = world.counts[task]
    for number in range(max(1, last - 2), last + 1):
        world = World(monkeypatch)
        world.slow(task, number, factor)
        found, took_s = run(settings, tmp_path / f"slow{number}", world)
        assert world.counts[task] >= number
        assert found[-1]["kind"] == "paused"
        assert took_s <= 1200.0
        _, _, facts, broken = checkpoint.newest(tmp_path / f"slow{number}" / "checkpoints")
        assert broken == {}
        assert facts["course"]["training"]["step"] == found[-1]["step"] > 20


def test_a_budget_shorter_than_one_evaluation_is_kept(long_run, tmp_path, monkeypatch):
    """The evaluation is broken off; nothing is lost, since nothing was done."""
    world = World(monkeypatch, load=1.0)
    found, took_s = run({**long_run, "teacher_cache": "live"}, tmp_path / "run", world, time_budget="25s")
    assert (found[-1]["kind"], took_s <= 25.0) == ("paused", True)
    assert "starts from the beginning" in found[-1]["reason"]
    found, took_s = run(long_run, tmp_path / "run", world, time_budget="10m")
    assert (found[-1]["kind"], found[-1]["step"] > 10, took_s <= 600.0) == ("paused", True, True)
    found, took_s = run(long_run, tmp_path / "run", world, time_budget="40s")
    assert (found[0]["session"], found[-1]["kind"], took_s <= 40.0) == (3, "paused", True)


def test_short_sessions_train_rather_than_keep_time_to_show_the_student(long_run, tmp_path, monkeypatch):
    """An evaluation and an export would take the whole session: they are not set aside, and the time trains."""
    world = World(monkeypatch, load=5.0, step=1.0, evaluation=4.0, save=1.0, export=20.0)
    live = {**long_run, "teacher_cache": "live"}
    run(live, tmp_path / "run", world, time_budget="3m")
    before = world.counts["step"]
    found, took_s = run(live, tmp_path / "run", world, time_budget="40s")
    assert (found[-1]["kind"], took_s <= 40.0) == ("paused", True)
    assert world.counts["step"] - before >= 7


def test_a_budget_that_is_spent_already_does_no_step(long_run, tmp_path, monkeypatch):
    """On Kaggle the session began before the run did."""
    world = World(monkeypatch)
    run(long_run, tmp_path / "run", world, time_budget="10m")
    before = checkpoint.newest(tmp_path / "run" / "checkpoints")[2]["course"]["training"]["step"]
    monkeypatch.setattr(environment, "session_age_s", lambda: 5000.0)
    steps = world.counts["step"]
    found, took_s = run(long_run, tmp_path / "run", world, time_budget="40m")
    assert (found[-1]["kind"], found[-1]["step"], world.counts["step"]) == ("paused", before, steps)
    assert took_s == COSTS["load"]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[2]["course"]["training"]["step"] == before


def test_a_clock_that_jumps(long_run, tmp_path, monkeypatch):
    """The machine's date means nothing to the budget; time that is gone, as after a suspension, ends the session at once."""
    world = World(monkeypatch)
    real = time.time
    days = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() + 86400.0 * (-1) ** next(days) * 300)
    found, took_s = run(long_run, tmp_path / "date", world, time_budget="10m")
    assert 400.0 < took_s <= 600.0
    world = World(monkeypatch)
    world.slow("step", 7, 1000.0)
    found, _ = run(long_run, tmp_path / "gone", world, time_budget="10m")
    assert (found[-1]["kind"], found[-1]["step"], world.counts["step"]) == ("paused", 7, 7)


def test_the_verdict_waits_for_a_session_that_has_time_for_it(long_run, tmp_path, monkeypatch):
    settings = {**long_run, "max_steps": 30, "eval_steps": 30}
    world = World(monkeypatch, export=200.0)
    world.slow("export", 1, 0.01)
    whole, _ = run(settings, tmp_path / "whole", world)
    found = []
    for minutes in (8, 10, 13):
        world = World(monkeypatch, export=200.0)
        out = tmp_path / f"run{minutes}"
        while not found or found[-1]["kind"] != "verdict":
            found, _ = run(settings, out, world, time_budget=f"{minutes}m")
        assert found[-1]["bits_per_byte"] == whole[-1]["bits_per_byte"]
        found = []


def test_the_plan_goes_on_through_the_control(long_run, tmp_path, monkeypatch):
    """It is told before the control begins, and what is left then comes to what the control and the verdict take."""
    monkeypatch.setattr(experiment.Experiment, "_step_cost_ratio", lambda self: 2.0)
    world = World(monkeypatch)
    settings, left = {**long_run, "control": "full", "max_steps": 12, "eval_steps": 4}, []
    for record in session.distill(Config.from_dict(settings), tmp_path / "run", world):
        plan_now = files.read_json(tmp_path / "run" / "status.json")["plan"]
        if record["kind"] == "eval" and record["run"] == "ce_only" and record["split"] == "validation":
            left.append((record["step"], plan_now["left_s"]))
    assert record["kind"] == "verdict"
    assert plan_now is None
    assert [step for step, _ in left] == [0, 8, 16, 24]
    assert left[0][1] == pytest.approx(24 * 18.0, rel=0.6)  # as the distilled student told it: as long as its own steps
    assert left[2][1] == pytest.approx(8 * 18.0 + 20.0 + 2 * 40.0, rel=0.3)


def test_durations():
    for text, seconds in {"11h": 39600, "40m": 2400, "90s": 90, "1h30m": 5400, "2": 7200, "0.5h": 1800}.items():
        assert clock.parse_duration(text) == seconds
    assert clock.parse_duration(1.5) == 5400
    assert clock.parse_duration("") == math.inf
    for wrong in ("x", "-1", "0", "1.2.3h", "h", "nan", "inf", "3d"):
        with pytest.raises(ValueError, match="time_budget takes hours or a duration like 11h, 40m, 1h30m or 90s; got"):
            clock.parse_duration(wrong)


def test_a_budget_adds_up():
    class Still:
        def now(self):
            return 100.0

    budget = time_budget.TimeBudget(1000.0, Still(), 40.0, {"save": 10.0}, {"save": 99.0, "export": 4.0})
    assert budget.cost("export") == 5.0
    budget.record("export", 2.0)
    assert budget.cost("export") == 2.5
    assert (budget.used(), budget.left(), budget.reserve(), budget.cost("save", "unknown")) == (60.0, 940.0, 20.0, 12.5)
    budget.record("step", 4.0)
    budget.record("step", 3.0)
    assert budget.costs["step"] == pytest.approx(4.0 * 0.97)
    assert budget.reserve() == pytest.approx(20.0 + 2 * 3.88)
    budget.record("long", 800.0)
    assert budget.fits("save")
    assert not budget.fits("long")
    assert time_budget.TimeBudget(math.inf, Still(), 0.0).fits("anything")


def test_the_end_of_a_session_is_kept_free_for_what_it_can_afford():
    costs = {"start": 20.0, "save": 10.0, "evaluate": 15.0, "export": 5.0}
    for seconds, affordable in ((25.0 + 100.0, True), (25.0 + 99.0, False)):  # 1.25 * 20 of them before the first step
        budget = time_budget.TimeBudget(seconds, None, 0.0, costs)
        assert budget.final_tasks() == ["save"] + ["evaluate", "export"] * affordable
        assert budget.training_seconds() == pytest.approx(seconds * 0.98 - 25.0 - 12.5 - 25.0 * affordable)


def test_the_plan_counts_what_is_left():
    class Arm:
        name, repeat, step, last_step, train_s = "distilled", 0, 10, 100, 50.0

    config = Config(max_steps=100, control="short", repeats=2)
    left = time_budget.seconds_left(
        config, 10, Arm, {"evaluate": 2.0, "test": 3.0, "conclude": 7.0}.get, saving_share=0.1
    )
    training = 450.0 + 0.1 * 500.0 + 1.1 * 500.0  # what is left of it, its control, the second pair
    assert left == pytest.approx(1.1 * training + (10 * 2.0 + 2 * 3.0) * training / 500.0 + 7.0)


def test_interrupts_are_wishes_and_the_second_one_is_not():
    former = signal.getsignal(signal.SIGINT)
    heard = time_budget.StopSignals()
    heard.listen()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert heard.reason == "asked to stop (SIGTERM)"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        heard.ignore()
    assert signal.getsignal(signal.SIGINT) is former


def test_the_session_is_as_old_as_the_machine_on_kaggle(tmp_path, monkeypatch):
    (tmp_path / "1").mkdir()
    ticks = os.sysconf("SC_CLK_TCK")
    (tmp_path / "1" / "stat").write_text("1 (a (b) c) S " + " ".join(["0"] * 18) + f" {250 * ticks} 0 0\n")
    (tmp_path / "uptime").write_text("1000.50 900.00\n")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert (environment.session_age_s(tmp_path), environment.disk_reserve_bytes()) == (0.0, 16 * 2**20)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert (environment.session_age_s(tmp_path), environment.disk_reserve_bytes()) == (750.5, 2**30)
    assert environment.session_age_s() > 0.0
