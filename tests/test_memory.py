"""What training takes of a machine's memory: told before it begins, and made less of where there is too little."""

import copy
import functools
import math
import types

import accelerate
import pytest
import torch
import transformers
from families import ARCHITECTURES, byte_level, tiny_model, unigram

from kdlib import clock, demo, files, memory
from kdlib.config import Config
from kdlib.models import forward, loading
from kdlib.session import experiment, inputs, session
from kdlib.training import loop, peak_memory

EVERYTHING = {
    "preset": "documents",
    "kd_method": "projector",
    "use_curriculum": False,
    "share_steps": 1,
    "feature_layers": 2,
}


def distil(settings, out, cut_at=None):
    found = []
    run = session.distill(Config.from_dict(settings), out)
    for record in run:
        found.append(record)
        if record["kind"] == "train" and record["step"] == cut_at:
            run.close()
    return found


def training_of(settings, student=None, **changes):
    config = Config.from_dict({**settings, "batch_size": 8, "loss_chunk_size": 32, **changes})
    loaded = inputs.load(config)
    student = loaded.pair.student if student is None else student
    objective = inputs.make_objective(loaded.pair, config, student)
    machine = accelerate.Accelerator(cpu=True)
    return loop.TrainLoop(
        objective, loaded.pair.teacher, loaded.train, 9, config, machine, clock.Clock(), loaded.pair.pads
    )


def with_dropout(model):
    """A model that draws random numbers in every pass."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    return model


def test_a_tally_counts_what_is_alive_once():
    before = torch.zeros(1000)
    with memory.AllocationTracker("cpu") as tally:
        a = before + 1
        b = a.view(10, 100)[2:]  # no memory of its own
        before.add_(1)
        assert (tally.current, tally.mark()[0]) == (4000, 4000)
        a = a.double()
        assert tally.current == 12000
        del b
        assert (tally.current, tally.mark()[0], tally.mark()[0]) == (8000, 12000, 8000)
        with torch.inference_mode():
            torch.nn.functional.linear(torch.ones(5, 10), torch.ones(20, 10), torch.ones(20))
        assert (tally.current, tally.mark()[0]) == (8000, 8000 + 4 * (50 + 200 + 20 + 100))
    assert torch.ones(7).sum() == 7 and tally.current == 8000


def test_a_machine_tells_its_memory():
    told, free = memory.usage("cpu"), memory.free("cpu")
    assert 2**20 < told["used_bytes"] < told["total_bytes"]
    assert 0 < free < told["total_bytes"]


@pytest.mark.parametrize("error", [OSError("no /proc"), RuntimeError("CUDA error: device lost"), AttributeError("rss")])
def test_memory_that_is_not_told_stands_in_nobodys_way(settings, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    for module, name in (
        (memory.psutil, "Process"), (memory.psutil, "virtual_memory"), (torch.cuda, "mem_get_info"),
        (torch.cuda, "memory_reserved"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, fail)
    for device in ("cpu", "cuda:0"):
        assert memory.usage(device) == {"used_bytes": None, "total_bytes": math.inf}
        assert memory.free(device) == memory.GUESSED_BYTES
    if isinstance(error, OSError):
        changes = {"max_steps": 2, "control": "off", "gradient_checkpointing": "auto"}
        assert distil({**settings, **changes}, tmp_path / "run")[-1]["kind"] == "verdict"
        trained = [r for r in files.read_records(tmp_path / "run" / "records.jsonl") if r["kind"] == "train"]
        assert {(r["memory"]["used_bytes"], r["memory"]["total_bytes"]) for r in trained} == {(None, None)}


SHAPES = {
    "kd": {},
    "everything": EVERYTHING,
    "accumulation": {"batch_size": 4, "grad_accumulation": 2},
    "average": {"use_ema": True},
    "again": {"gradient_checkpointing": "on"},
    "again, accumulation": {"gradient_checkpointing": "on", "batch_size": 4, "grad_accumulation": 2},
    "one window": {"batch_size": 1},
    "an update": {"batch_size": 1, "max_length": 8, "kd_method": "none"},
}
USED = 10**8


@pytest.mark.parametrize("name", SHAPES)
def test_the_height_of_real_steps_is_foretold(settings, monkeypatch, name):
    """From fewer windows than a step has, to 8 %; nothing random is used up, no gradient left, nothing learned."""
    monkeypatch.setattr(memory, "usage", lambda device: {"used_bytes": USED, "total_bytes": 10**12})
    changes = (
        {"width": 64, "tie_word_embeddings": False} if name == "an update" else {}
    )  # higher than passes over few tokens
    training = training_of(settings, with_dropout(tiny_model(unigram(), **changes)), **SHAPES[name])
    shortest, *_, longest = sorted(training.windows, key=lambda window: len(window.student_ids))
    training.windows = [shortest] * 8 + [longest] * 8
    state, weights = torch.get_rng_state(), loading.cpu_state_dict(training.objective)
    predicted = peak_memory.predicted_bytes(training) - USED
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in training.objective.parameters())
    assert all(torch.equal(weights[key], value) for key, value in loading.cpu_state_dict(training.objective).items())
    training.windows = [longest] * 8
    steps = iter(training)
    with memory.AllocationTracker("cpu") as tally:
        for _ in range(3):
            next(steps)
    assert predicted == pytest.approx(tally.peak, rel=0.08)
    assert peak_memory.predicted_bytes(training) - USED == pytest.approx(
        predicted - 8 * sum(p.numel() for p in training.objective.parameters()), rel=0.08
    )  # the moments are there now


def test_one_pass_over_a_fourth_is_measured(settings, monkeypatch):
    """Its windows are the longest and the head's chunks a fourth; the run's own chunk size stays."""
    training = training_of(settings, loss_chunk_size=512, batch_size=8)
    longest = max(len(window.student_ids) for window in training.windows)
    passes, points = [], peak_memory._points

    def record(run, windows):
        passes.append((len(windows), len(windows[-1].student_ids), run.objective.chunk_sizes[0]))
        return points(run, windows)

    monkeypatch.setattr(peak_memory, "_points", record)
    peak_memory.predicted_bytes(training)
    assert passes == [(2, longest, 128)] and training.objective.chunk_sizes[0] == 512


def test_casts_of_weights_are_counted_where_there_are_any():
    student = tiny_model(unigram())
    linear = [m.weight.numel() for m in student.modules() if isinstance(m, torch.nn.Linear)]
    head = student.get_output_embeddings().weight
    count = functools.partial(peak_memory._cast_bytes, student=student, head=head)
    assert count(types.SimpleNamespace(mixed_precision="no")) == 0
    assert count(types.SimpleNamespace(mixed_precision="bf16")) == 2 * (sum(linear) - head.numel())


@pytest.mark.parametrize("changes", [{}, {"batch_size": 4, "grad_accumulation": 2}], ids=["whole", "accumulated"])
def test_a_step_holds_all_gradients_from_its_second_pass_on(settings, monkeypatch, changes):
    training = training_of(settings, **changes)
    monkeypatch.setattr(memory, "usage", lambda device: {"used_bytes": USED, "total_bytes": 10**12})
    monkeypatch.setattr(peak_memory, "_measure", lambda training: ([point(10**9)], 1))
    parameters = 4 * sum(p.numel() for p in training.objective.parameters())
    expected = USED + 2 * parameters + 10**9 + bool(changes) * parameters  # AdamW has two moments
    assert peak_memory.predicted_bytes(training) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_of_a_tied_head_has_a_gradient_of_its_own(settings, tied):
    """The gradient of the head is there from the forward pass on."""
    training = training_of(settings, tiny_model(unigram(), tie_word_embeddings=tied))
    parameters, head = training.objective.parameters(), training.objective.head.weight
    total = 4 * sum(p.numel() for p in parameters)
    teacher, objective, *_, last = peak_memory._points(training, training.windows[:2])
    assert (teacher.fixed, objective.fixed, last.fixed) == (0, 4 * head.numel(), 4 * head.numel())
    assert last.gradients == total - (0 if tied else 4 * head.numel())
    assert teacher.gradients == objective.gradients == 0 < last.last_gradient


def point(live, other=1000, **fixed):
    return peak_memory._Point(live, other, **fixed)


def test_only_what_depends_on_the_windows_grows():
    """Of 100 live bytes 30 are gradients, the last of them 5, and 10 are fixed: 60 grow."""
    points = [point(100, gradients=30, last_gradient=5, fixed=10)]
    assert peak_memory._peak(points, 3, 1000, False) == 30 + 10 + 3 * 60
    assert peak_memory._peak(points, 3, 1000, True) == 5 + 10 + 3 * 60
    assert peak_memory._peak([point(20, gradients=30)], 3, 1000, False) == 30


def test_what_an_allocator_keeps_grows_with_the_windows():
    assert peak_memory._peak([point(100, 1020)], 2.5, 1000, False) == 250 + 50
    assert peak_memory._peak([point(100, 990)], 1, 1000, False) == 100


def test_what_was_alive_elsewhere_is_not_counted_again():
    """A point with little alive, where the allocator still holds what an earlier pass has let go."""
    lively, less, idle = point(220, 1010), point(160, 1060), point(16, 1233)
    assert peak_memory._peak([lively, idle], 2, 1000, False) == 440 + 20
    assert peak_memory._peak([idle, less, lively], 2, 1000, False) == 440 + 20
    assert peak_memory._peak([idle, point(160, 1100), lively], 2, 1000, False) == 320 + 200


def test_adapters_take_the_passes_without_the_gradients_of_the_weights(settings, monkeypatch):
    """Of 10,000,000 live bytes, 2,000,000 are gradients, the head's is fixed and 500 other bytes are: the rest grows."""
    training = training_of(settings)
    student, head = training.objective.student, training.objective.head.weight
    head_bytes = 4 * head.numel()
    points = [peak_memory._Point(10**7, 3000, 2 * 10**6, 700, head_bytes + 500), peak_memory._Point(10**6, 3000)]
    monkeypatch.setattr(peak_memory, "_measure", lambda training: (points, 3.0))
    monkeypatch.setattr(memory, "usage", lambda device: {"used_bytes": 3000, "total_bytes": 10**9})
    linear = [layer.weight for layer in student.modules() if isinstance(layer, torch.nn.Linear)]
    linear = [weight for weight in linear if weight is not head]
    assert len(linear) == 7 * len(student.model.layers)
    adapters = 16 * 4 * sum(weight.shape[0] + weight.shape[1] for weight in linear)
    expected = 3000 + 500 + 3 * (10**7 - 2 * 10**6 - head_bytes - 500) + adapters
    lora, qlora = peak_memory.predicted_with_adapters(training, 4)
    assert lora == expected
    assert qlora == expected - (4 - 0.5625) * sum(weight.numel() for weight in linear)


def test_where_not_even_a_few_windows_fit_the_height_is_infinite(settings, tmp_path, monkeypatch):
    training = training_of(settings)

    def out(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(peak_memory, "_points", out)
    assert peak_memory.predicted_bytes(training) == math.inf
    found = distil({**settings, "control": "off"}, tmp_path / "run")
    (alert,) = [r for r in found if r["kind"] == "alert" and r["sign"] != "teacher_passed"]
    assert alert["meaning"].startswith("the predicted peak exceeds")
    assert {r["memory"]["predicted_bytes"] for r in found if r["kind"] == "train"} == {None}


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_layers_made_anew_give_the_same_loss_and_gradients(settings, tmp_path, kind):
    """All parts on, dropout drawn twice alike, gradients of the single parts measured on the way."""
    tokenizer = unigram()
    model = with_dropout(ARCHITECTURES[kind](tokenizer))
    found = []
    for on in (False, True):
        torch.manual_seed(2)
        training = training_of(settings, copy.deepcopy(model), **EVERYTHING)
        training.gradient_checkpointing = on
        training.objective.train()
        torch.manual_seed(3)
        with memory.AllocationTracker("cpu") as tally:
            _, values = training._gradients_that_fit(training.windows[:8], training.objective.weights(), True, None)
        gradients = {name: p.grad for name, p in training.objective.named_parameters()}
        found.append((values, gradients, tally.peak))
    (values, gradients, most), (again, anew, less) = found
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    for (parts, squares), (others, measured) in zip(values, again, strict=True):
        torch.testing.assert_close(others, parts)
        torch.testing.assert_close(measured, squares)
        assert len(squares) == 7
    torch.testing.assert_close(anew, gradients)
    assert less < most


def test_nothing_is_left_of_making_layers_anew():
    model = tiny_model(byte_level(), 16).train()
    ids, mask = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.long)
    config = model.config.to_dict()
    with memory.gradient_checkpointing_enabled(model):
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    with memory.gradient_checkpointing_enabled(model, False):
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config.to_dict() == config
    copied = copy.deepcopy(model)
    assert torch.equal(forward.last_hidden(copied, ids, mask), forward.last_hidden(model, ids, mask))


def limited(monkeypatch, total):
    monkeypatch.setattr(memory, "usage", lambda device: {"used_bytes": 0, "total_bytes": total})


def heights(settings, monkeypatch):
    limited(monkeypatch, 0)
    return [peak_memory.predicted_bytes(training_of(settings, gradient_checkpointing=way)) for way in ("off", "on")]


@pytest.fixture
def tight(settings, pair, tmp_path, monkeypatch):
    """Settings of a deeper student, and a machine that holds its training only with layers made anew."""
    demo.save(tiny_model(unigram(), 16, 6), unigram(), tmp_path / "student")
    values = {
        **settings,
        "student": str(tmp_path / "student"),
        "batch_size": 8,
        "loss_chunk_size": 32,
        "control": "off",
    }
    values |= {"max_steps": 3, "eval_tokens": 60}
    plain, anew = heights(values, monkeypatch)
    assert anew < 0.9 * plain
    limited(monkeypatch, (plain + anew) // 2)
    return values, plain, anew


def test_layers_are_made_anew_where_a_step_would_not_fit(tight, tmp_path, monkeypatch):
    settings, plain, anew = tight
    seen, real = [], memory.gradient_checkpointing_enabled
    monkeypatch.setattr(
        memory, "gradient_checkpointing_enabled", lambda model, on=True: seen.append(on) or real(model, on)
    )
    found = distil(settings, tmp_path / "run")
    (alert,) = [r for r in found if r["kind"] == "alert" and r["sign"] != "teacher_passed"]
    assert (alert["sign"], alert["step"], "gradient checkpointing is on" in alert["meaning"]) == ("memory", 0, True)
    assert {r["memory"]["predicted_bytes"] for r in found if r["kind"] == "train"} == {anew}
    assert seen[-3:] == [True] * 3
    seen.clear()
    found = distil({**settings, "gradient_checkpointing": "off"}, tmp_path / "off")
    (alert,) = [r for r in found if r["kind"] == "alert" and r["sign"] != "teacher_passed"]
    assert "exceeds" in alert["meaning"] and not any(seen)
    assert {r["memory"]["predicted_bytes"] for r in found if r["kind"] == "train"} == {plain}


@pytest.mark.parametrize("then", ["auto", "off"])
def test_what_was_decided_stays_over_a_resume(tight, tmp_path, monkeypatch, then):
    """In a session with room enough; unless it is told otherwise."""
    settings, *_ = tight
    distil(settings, tmp_path / "run", cut_at=2)
    limited(monkeypatch, 10**12)
    seen, real = [], memory.gradient_checkpointing_enabled
    monkeypatch.setattr(
        memory, "gradient_checkpointing_enabled", lambda model, on=True: seen.append(on) or real(model, on)
    )
    found = distil({**settings, "gradient_checkpointing": then}, tmp_path / "run")
    assert (found[0]["resumed"], found[-1]["kind"]) == ("step-00000002", "verdict")
    assert seen[-1] == (then == "auto")
    assert not [r for r in found if r["kind"] == "alert" and r["sign"] != "teacher_passed"]  # the first session told


def test_every_process_does_as_the_first_one(settings, monkeypatch):
    """Each sees a card of its own; a step that one of them made anew and another not would never meet."""
    limited(monkeypatch, 10**12)
    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", lambda own: [True])
    training = training_of(settings)
    scorer = types.SimpleNamespace(on_progress=lambda *_: None)
    here = types.SimpleNamespace(config=training.config, accelerator=training.accelerator, scorer=scorer)
    experiment.Experiment._make_fit(here, training)
    assert training.gradient_checkpointing


def test_the_control_decides_for_itself(tight, tmp_path, monkeypatch):
    """It has no teacher signal to keep: with room for that alone it runs plain, and its steps are timed so."""
    settings, *_ = tight
    config = Config.from_dict(settings).control_config().to_dict()
    plain, _ = heights(config, monkeypatch)
    whole, anew = heights(settings, monkeypatch)
    assert max(plain, anew) < whole
    limited(monkeypatch, (max(plain, anew) + whole) // 2)
    seen, real = [], loop.TrainLoop._gradients

    def gradients(self, *given):
        seen.append((self.teacher is not None, self.gradient_checkpointing))
        return real(self, *given)

    monkeypatch.setattr(loop.TrainLoop, "_gradients", gradients)
    monkeypatch.setattr(experiment, "CALIBRATION_BLOCKS", 1)
    monkeypatch.setattr(experiment, "CALIBRATION_STEPS", 2)
    found = distil({**settings, "control": "full"}, tmp_path / "run")
    assert found[-1]["kind"] == "verdict"
    assert set(seen) == {(True, True), (False, False)}


class Unable(transformers.LlamaForCausalLM):
    supports_gradient_checkpointing = False


def test_a_model_that_can_not_is_refused_or_left_alone(settings, tmp_path, monkeypatch):
    assert memory.can_recompute(tiny_model(byte_level()))
    config = tiny_model(unigram()).config
    assert not memory.can_recompute(Unable(config))
    monkeypatch.setattr(memory, "can_recompute", lambda model: False)
    with pytest.raises(ValueError, match="gradient_checkpointing on: LlamaForCausalLM has no support for it") as error:
        distil({**settings, "gradient_checkpointing": "on"}, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    limited(monkeypatch, 1)
    training = training_of(settings)
    peak_memory.fit(training, 1)
    assert not training.gradient_checkpointing
