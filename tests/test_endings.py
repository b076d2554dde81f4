"""Once training is over nothing keeps student and verdict from the disk; what is saved stays, and the state says so."""

import contextlib
import itertools
import os
import shutil
import signal
import weakref

import pytest
import safetensors.torch
import torch
import transformers
from families import byte_level, unigram

from kdlib import demo, files
from kdlib.clock import Clock
from kdlib.config import Config
from kdlib.evaluation import internals, scoring
from kdlib.files import read_json, read_records
from kdlib.models import devices, teacher_cache
from kdlib.models.teacher import Teacher
from kdlib.report import html
from kdlib.session import cache_writer, experiment, finish, inputs, resume, run_folder, session, time_budget
from kdlib.training import loop

SMALL = {"control": "off", "max_steps": 2, "eval_steps": 1}


def distil(settings, out, **more):
    return list(session.distill(Config.from_dict(settings), out, **more))


def status(out):
    return read_json(out / "status.json")


def weights(out):
    return (out / "student" / "model.safetensors").read_bytes()


def alerts(found):
    return {
        record["part"]: record["meaning"]
        for record in found
        if record["kind"] == "alert" and record["sign"] != "teacher_passed"
    }


def raising(error):
    def call(*_, **__):
        raise error

    return call


def out_of_time(patch):
    """No time is left for another step; there is enough for everything else."""
    patch.setattr(time_budget.TimeBudget, "fits", lambda budget, *tasks: "step" not in tasks)
    patch.setattr(session.Session, "_describe_time", lambda session: "no time is left")


@pytest.mark.parametrize(
    ("module", "name", "part"),
    [
        (finish, "_generate_samples", "the samples"), (internals, "look", "the model analysis"),
        (html, "write_report", "the report"),
    ],
)  # fmt: skip
def test_what_only_shows_a_run_may_fail(settings, tmp_path, monkeypatch, module, name, part):
    monkeypatch.setattr(module, name, raising(RuntimeError("no such layer\nsecond line")))
    found = distil({**settings, **SMALL}, tmp_path / "run")
    assert found[-1]["kind"] == "verdict"
    assert status(tmp_path / "run")["state"] == "complete"
    assert alerts(found) == {part: f"{part} failed: RuntimeError: no such layer"}
    assert read_records(tmp_path / "run" / "records.jsonl")[-1]["part"] == part
    assert read_json(tmp_path / "run" / "verdict.json")["answer"]
    assert weights(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_student_and_verdict_are_written_before_anything_is_looked_at(settings, tmp_path, monkeypatch):
    out, seen = tmp_path / "run", []

    def look(*_):
        seen.append((status(out)["state"], weights(out) != b"", (out / "verdict.json").exists()))
        return {}

    monkeypatch.setattr(finish, "_generate_samples", look)
    distil({**settings, **SMALL}, out)
    assert seen == [("complete", True, True)]


def test_a_process_that_dies_while_it_draws_left_a_complete_run(settings, tmp_path, monkeypatch):
    """The next start draws the page, and has nothing else to do."""
    out = tmp_path / "run"

    class Died(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(html, "write_report", raising(Died()))
        with pytest.raises(Died):
            distil({**settings, **SMALL}, out)
    assert status(out)["state"] == "complete"
    before = weights(out)
    found = distil({**settings, **SMALL}, out)
    assert [record["kind"] for record in found] == ["verdict"]
    assert (out / "report.html").exists()
    assert weights(out) == before


def hybrid(kind, tokenizer):
    """A tiny model some of whose layers are no attentions."""
    common = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "lfm2":
        made = transformers.Lfm2Config(**common, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    elif kind == "qwen3_next":
        made = transformers.Qwen3NextConfig(
            **common, layer_types=["linear_attention", "full_attention"], head_dim=8, linear_key_head_dim=8,
            linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, num_experts=2,
            num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        )  # fmt: skip
    elif kind == "recurrent_gemma":
        made = transformers.RecurrentGemmaConfig(
            **{**common, "num_hidden_layers": 3}, lru_width=16, attention_window_size=64, logits_soft_cap=None
        )
    return transformers.AutoModelForCausalLM.from_config(made)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next"])
def test_a_hybrid_model_ends_with_a_student_and_a_verdict(settings, tmp_path, kind, role):
    tokenizer = unigram() if role == "student" else byte_level()
    demo.save(hybrid(kind, tokenizer), tokenizer, tmp_path / kind)
    found = distil({**settings, **SMALL, role: str(tmp_path / kind)}, tmp_path / "run")
    assert found[-1]["kind"] == "verdict"
    assert status(tmp_path / "run")["state"] == "complete"
    assert weights(tmp_path / "run")
    look = read_json(tmp_path / "run" / "figures" / "inside.json")
    assert "without" in look or look["attention"]


def test_a_text_without_a_common_position_has_no_look_inside(settings, tmp_path):
    """As short answers have: the held-out sample has no aligned position."""
    loaded = inputs.load(Config.from_dict(settings))
    for group in loaded.test.windows:
        for window in group:
            for name in ("student_rows", "teacher_rows", "student_span_ends", "teacher_span_ends"):
                object.__setattr__(window, name, getattr(window, name)[:0])
    look = internals.look(Config.from_dict(settings), loaded, {})
    assert "no held-out window has an aligned position" in look["without"]


@pytest.mark.parametrize(
    ("what", "kind"),
    [("evaluate", RuntimeError), ("write_student", OSError), ("write_report", ValueError), ("evaluate", MemoryError)],
)
def test_a_pause_that_can_not_export_is_still_a_pause(settings, tmp_path, monkeypatch, kind, what):
    """The checkpoint is whole, the state says so, and the next session ends the run as if nothing had happened."""
    settings = {**settings, "control": "off", "max_steps": 4, "eval_steps": 3, "save_steps": 1}
    distil(settings, tmp_path / "whole")
    place = {"evaluate": experiment.Experiment, "write_student": finish, "write_report": html}[what]
    real = experiment.Experiment.evaluate

    def failing(*given):
        if what == "evaluate" and given[1].step != 2:
            return real(*given)
        raise kind("it broke")

    found, out = [], tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(place, what, failing)
        for record in session.distill(Config.from_dict(settings), out):
            found.append(record)
            if record["kind"] == "train" and record["step"] == 2:
                out_of_time(patch)
    assert found[-1]["kind"] == "paused"
    assert status(out)["state"] == "paused"
    assert "resumes from step-00000002" in status(out)["reason"]
    name = "the evaluation" if what == "evaluate" else "the export"
    assert "it broke" in alerts(found)[name] and name in alerts(found)[name]
    assert distil(settings, out)[-1]["kind"] == "verdict"
    assert weights(out) == weights(tmp_path / "whole")


def test_a_checkpoint_that_can_not_be_written_is_no_failed_run(settings, tmp_path, monkeypatch):
    """Whatever the library that writes it raises: the session ends paused, and says why."""
    out = tmp_path / "run"
    settings = {**settings, "control": "off", "max_steps": 4, "save_steps": 2}
    with monkeypatch.context() as patch:
        for record in session.distill(Config.from_dict(settings), out):
            if record["kind"] == "train" and record["step"] == 3:
                patch.setattr(safetensors.torch, "save_file", raising(safetensors.SafetensorError("I/O error")))
                out_of_time(patch)
    assert record["kind"] == "paused"
    assert "not saved (I/O error); resumes from step-00000002" in record["reason"]
    assert distil(settings, out)[-1]["kind"] == "verdict"


def test_a_second_interrupt_does_not_spoil_a_complete_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "write_report", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        distil({**settings, **SMALL}, tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "complete"


def test_the_budget_may_end_while_the_models_load(settings, tmp_path, monkeypatch):
    """Nothing of an earlier session is lost, though this one has come to nothing; nor is a run begun elsewhere."""
    settings = {**settings, "control": "off", "max_steps": 4, "save_steps": 2}
    distil(settings, tmp_path / "whole")
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        for record in session.distill(Config.from_dict(settings), out):
            if record["kind"] == "train" and record["step"] == 2:
                out_of_time(patch)

    class Slow:
        time = 0.0

        def now(self):
            return self.time

    def short(where, resume_from):
        clock = Slow()

        def on_progress(phase, done, total):
            clock.time += 10.0

        return distil(
            {**settings, "time_budget": "25s"}, where, clock=clock, resume=resume_from, on_progress=on_progress
        )

    config = files.read_json(out / "config.json")
    fresh = short(tmp_path / "fresh", "auto")
    assert [record["kind"] for record in fresh] == ["paused"]
    assert status(tmp_path / "fresh")["state"] == "paused"
    elsewhere, again = short(tmp_path / "elsewhere", str(out)), short(out, "auto")
    for found, where in ((again, out), (elsewhere, tmp_path / "elsewhere")):
        assert [record["kind"] for record in found] == ["paused"]
        assert "resumes from step-00000002" in found[0]["reason"]
        assert status(where)["sessions"] == 2
        assert files.read_json(where / "config.json") == config
        assert (status(where)["step"], status(where)["max_steps"]) == (2, 4)
        assert distil(settings, where)[-1]["kind"] == "verdict"
        assert weights(where) == weights(tmp_path / "whole")


def test_a_run_that_is_brought_from_elsewhere_may_be_brought_again(settings, tmp_path, monkeypatch):
    """The process dies as it copies the checkpoint: the same command goes on with it."""
    settings = {**settings, "control": "off", "max_steps": 4, "save_steps": 2}
    steps = session.distill(Config.from_dict(settings), tmp_path / "first")
    while next(steps).get("step", 0) < 3:
        pass
    steps.close()
    real = files.copy

    def dying(source, target, *more):
        if target.name.startswith("step-"):
            raise KeyboardInterrupt
        real(source, target, *more)

    with monkeypatch.context() as patch:
        patch.setattr(files, "copy", dying)
        with pytest.raises(KeyboardInterrupt):
            distil(settings, tmp_path / "second", resume=str(tmp_path / "first"))
    found = distil(settings, tmp_path / "second", resume=str(tmp_path / "first"))
    assert [record["resumed"] for record in found if record["kind"] == "start"] == ["step-00000003"]
    with pytest.raises(ValueError, match="holds another run"):
        distil(settings, tmp_path / "second", resume=str(tmp_path / "first"))


def test_a_signal_while_the_models_load_is_a_pause(settings, tmp_path):
    def unheard(number, frame):
        """Keeps the test alive where the session does not listen."""

    def on_progress(phase, done, total):
        if phase.startswith("the teacher reads") and done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    former = signal.signal(signal.SIGTERM, unheard)
    try:
        found = distil({**settings, **SMALL}, tmp_path / "run", on_progress=on_progress)
        assert [record["kind"] for record in found] == ["paused"]
        assert "SIGTERM" in found[0]["reason"]
        assert signal.getsignal(signal.SIGTERM) is unheard
    finally:
        signal.signal(signal.SIGTERM, former)


def test_everything_that_takes_long_says_how_far_it_is(settings, tmp_path):
    """By a name, and by how many batches of how many are done."""
    heard = []
    settings = {**settings, "max_length": 160, "max_steps": 12, "eval_steps": 6, "batch_size": 8}
    for record in session.distill(
        Config.from_dict(settings), tmp_path / "run", on_progress=lambda *at: heard.append(at)
    ):
        heard.append(record["kind"])
    phases = [phase for phase, _ in itertools.groupby(at if isinstance(at, str) else at[0] for at in heard)]
    assert phases[:7] == [
        "reading the text", "loading the teacher", "loading the student", "tokenizing the text", "fingerprinting the models",
        "the teacher reads validation text", "the teacher reads test text",
    ]  # fmt: skip
    assert phases.index("the teacher reads the text, positions") < phases.index("start")
    for phase in ("matching the vocabularies", "scoring the student on validation text", "scoring the student on test text",
                  "predicting peak memory", "timing steps for the control, blocks", "the samples",
                  "the model analysis", "the report"):  # fmt: skip
        assert phase in phases
    counted = [at for at in heard if not isinstance(at, str)]
    for phase in ("the teacher reads test text", "scoring the student on test text"):
        first = [(done, total) for name, done, total in counted if name == phase]
        assert first[: first[0][1]] == [(done, first[0][1]) for done in range(first[0][1])]


def test_held_out_text_is_read_once(settings, monkeypatch):
    """One pass of the teacher gives its states, its score and the check of its tokenizer."""
    passes, real = [], Teacher.states

    def states(self, batch):
        passes.append(batch.num_student_tokens)
        return real(self, batch)

    monkeypatch.setattr(Teacher, "states", states)
    monkeypatch.setattr(scoring, "check_tokenizers_fit", lambda *_: None)
    loaded = inputs.load(Config.from_dict({**settings, "check_teacher": True}))
    held_out = [batch.num_student_tokens for text in (loaded.validation, loaded.test) for batch in text.batches]
    assert sorted(passes) == sorted(held_out)


def test_timing_steps_for_the_control_takes_no_more_memory_than_training(settings, tmp_path, monkeypatch):
    """The pair's own student, one optimizer at a time, and its weights as they were."""
    living, most, students = weakref.WeakSet(), [], set()
    real = experiment.Experiment._training

    def training(self, objective, *given):
        made = real(self, objective, *given)
        living.add(made.optimizer.optimizer)
        most.append(len(living))
        students.add(id(objective.student))
        return made

    monkeypatch.setattr(experiment.Experiment, "_training", training)
    config = Config.from_dict({**settings, "control": "full"})
    made = session.Session(config.replace(teacher_cache="live"), tmp_path / "run", Clock())
    plan = made.experiment
    plan.arms.append(plan._new_arm("distilled", 0))
    plan.arms[0].train_s = 1e9
    assert plan._step_cost_ratio() > 0.0
    assert len(most) == 2 * experiment.CALIBRATION_BLOCKS
    assert max(most) == 1
    assert students == {id(made.experiment.pair.student)}
    for name, tensor in made.experiment.pair.student.state_dict().items():
        assert name not in plan.start_weights or torch.equal(tensor, plan.start_weights[name])


def test_timing_steps_ends_when_it_took_its_share(settings, tmp_path, monkeypatch):
    class Steps:
        gradient_checkpointing, prepared = False, torch.nn.Linear(1, 1)

        def __init__(self, objective, *_, **__):
            self.step_s = 3.0 if "kd" in objective.terms else 1.0

        def __iter__(self):
            for _ in itertools.count():
                clock.time += self.step_s
                yield type("Record", (), {"step_s": self.step_s})

    class Slow:
        time = 0.0

        def now(self):
            return self.time

    clock, begun = Slow(), []
    config = Config.from_dict({**settings, "teacher_cache": "live"})
    made = session.Session(config, tmp_path / "run", clock)
    made.experiment.arms.append(made.experiment._new_arm("distilled", 0))
    made.experiment.arms[0].train_s = 500.0  # a block of 12 s twice fits into 25 s
    monkeypatch.setattr(experiment, "TrainLoop", Steps)
    made.experiment.scorer.on_progress = lambda phase, done, total: begun.append(done)
    assert made.experiment._step_cost_ratio() == 3.0
    assert sorted(set(begun)) == [0, 1]


def test_a_cache_stops_within_a_shard(settings, tmp_path, monkeypatch):
    """By a signal, or by the clock; no further batch is read, and the next call ends with the same bytes."""
    monkeypatch.setattr(teacher_cache, "SHARD_POSITIONS", 10**6)
    config = Config.from_dict({**settings, "batch_size": 2})
    list(cache_writer.cache_teacher(config, tmp_path / "whole"))
    for name in ("signal", "clock"):
        heard = []

        class Slow:
            time = 0.0

            def now(self):
                return self.time

        clock = Slow()

        def on_progress(phase, done, total, name=name, heard=heard, clock=clock):
            if phase.startswith("the teacher reads the text"):
                heard.append(done)
                if len(heard) == 3 and name == "signal":
                    os.kill(os.getpid(), signal.SIGTERM)
                elif len(heard) == 3:
                    clock.time = 100.0

        limited = config.replace(time_budget="60s")
        found = list(cache_writer.cache_teacher(limited, tmp_path / name, clock, on_progress=on_progress))
        assert found[-1]["kind"] == "paused"
        assert ("SIGTERM" if name == "signal" else "time budget") in found[-1]["reason"]
        assert len(heard) == 3
        assert list(cache_writer.cache_teacher(config, tmp_path / name))[-1]["kind"] == "complete"
        for path in (tmp_path / "whole").glob("*.safetensors"):
            assert (tmp_path / name / path.name).read_bytes() == path.read_bytes()


def test_a_step_with_a_part_that_is_no_number_moves_nothing_under_a_loss_scaler(settings, monkeypatch):
    """Also where its gradients are finite: the step is recorded as skipped, so it must not be taken."""
    config = Config.from_dict({**settings, "teacher_cache": "live"})
    loaded, machine = inputs.load(config), devices.accelerator("fp32")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6)
    monkeypatch.setattr(machine, "scaler", scaler)
    monkeypatch.setattr(machine, "unscale_gradients", lambda optimizer: scaler.unscale_(optimizer.optimizer))
    objective = inputs.make_objective(loaded.pair, config)
    training = loop.TrainLoop(objective, loaded.pair.teacher, loaded.train, 6, config, machine, Clock())
    real = loop.TrainLoop._gradients

    def gradients(self, *given):
        counts, found = real(self, *given)
        if self.step in (0, 2):
            found[0][0]["kd"] = torch.tensor(float("inf"))
        return counts, found

    monkeypatch.setattr(loop.TrainLoop, "_gradients", gradients)
    before = {name: tensor.clone() for name, tensor in objective.student.state_dict().items()}
    moved = []
    for record in itertools.islice(training, 4):
        now = objective.student.state_dict()
        moved.append(any(not torch.equal(now[name], before[name]) for name in now))
        before = {name: tensor.clone() for name, tensor in now.items()}
        assert (record.skipped == "") == moved[-1], record.skipped
    assert moved == [False, True, False, True]
    assert scaler.get_scale() == 2.0**8


def test_what_a_checkpoint_holds_is_loaded_when_it_is_needed(settings, tmp_path, monkeypatch):
    """Not before the models, where all of it together would take more memory than the run."""
    config = Config.from_dict({**settings, "control": "off", "max_steps": 4, "save_steps": 2})
    steps = session.distill(config, tmp_path / "run")
    while next(steps).get("step", 0) < 3:
        pass
    steps.close()
    loaded, real = [], safetensors.torch.load_file
    monkeypatch.setattr(safetensors.torch, "load_file", lambda path: loaded.append(path) or real(path))
    found = resume.find_previous_run(run_folder.RunFolder(tmp_path / "run"), "auto")
    assert found.facts is not None
    assert set(found.groups) >= {"student", "optimizer", "random"}
    assert loaded == []


def test_a_folder_is_a_run_as_soon_as_it_is_one(settings, tmp_path):
    """Readers find records before the first was written."""
    steps = session.distill(Config.from_dict({**settings, **SMALL}), tmp_path / "run")
    next(steps)
    assert read_records(tmp_path / "run" / "records.jsonl") == []
    steps.close()


@pytest.mark.slow
def test_an_error_at_any_write_of_a_session_costs_nothing(settings, tmp_path, monkeypatch):
    """Each replacement of a file or folder fails once, in three ways: the run ends in a state that is true, and the next
    session ends it as if nothing had happened.
    """
    settings = {**settings, "control": "full", "max_steps": 4, "eval_steps": 2, "save_steps": 2}
    monkeypatch.setattr(experiment.Experiment, "_step_cost_ratio", lambda self: 1.0)
    distil(settings, tmp_path / "whole")
    real, count, seen = files._replace, itertools.count(), {"injected": 0, "paused": 0, "failed": 0, "complete": 0}

    errors = OSError(28, "No space left on device"), OSError(5, "Input/output error"), RuntimeError("a bug")
    for kind, error in enumerate(errors):
        for place in range(kind, 200, 5):
            calls, out = itertools.count(), tmp_path / f"run{next(count)}"

            def failing(beside, path, calls=calls, place=place, error=error):
                if next(calls) == place:
                    raise error
                real(beside, path)

            with monkeypatch.context() as patch:
                patch.setattr(files, "_replace", failing)
                with contextlib.suppress(ValueError, OSError, RuntimeError):
                    distil(settings, out)
            if next(calls) <= place:
                break
            seen["injected"] += 1
            state = status(out).get("state", "none") if (out / "status.json").exists() else "none"
            seen[state] = seen.get(state, 0) + 1
            distil(settings, out)
            assert status(out)["state"] == "complete", (place, error)
            assert weights(out) == weights(tmp_path / "whole")
            shutil.rmtree(out)
    assert seen["injected"] > 10
