"""A teacher on another device works one batch ahead, and the student can't tell. The other device is `cpu:0` here."""

import copy
import gc
import threading
import types

import accelerate
import pytest
import torch

from kdlib import clock, files
from kdlib.config import Config
from kdlib.data import batching
from kdlib.models import devices, forward, prefetch
from kdlib.session import inputs, session
from kdlib.training import loop

CONFIGS = {
    "accumulation": {"grad_accumulation": 3, "kd_method": "projector"},
    "spans": {"grad_accumulation": 2, "kd_method": "chunk_likelihood", "use_ema": True},
    "curriculum": {"preset": "documents", "balance": "auto", "share_steps": 3},
}
NUM_STEPS = 6


@pytest.fixture(params=CONFIGS)
def config(request, settings):
    return Config.from_dict({**settings, **CONFIGS[request.param]})


def loaded(config, device):
    return inputs.load(config, "cpu", torch.float32, device)


def training(given, config, restored=None):
    objective = inputs.make_objective(given.pair, config, copy.deepcopy(given.pair.student))
    machine = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    made = loop.TrainLoop(
        objective, given.pair.teacher, given.train, NUM_STEPS, config, machine, clock.Clock(), given.pair.pads
    )
    if restored:
        made.load_state(*restored)
    return made


def steps_of(stream):
    return [{name: value for name, value in vars(record).items() if name != "step_s"} for record in stream]


def state_of(made):
    return {f"{group}/{name}": t.clone() for group, ts in made.state_tensors().items() for name, t in ts.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def counted(monkeypatch):
    """The threads in which teachers that work ahead did a batch each."""
    calls, real = [], prefetch.PrefetchingTeacher._read_to_host
    monkeypatch.setattr(
        prefetch.PrefetchingTeacher,
        "_read_to_host",
        lambda *given, **teacher_request: calls.append(threading.get_ident()) or real(*given, **teacher_request),
    )
    return calls


def plain_run(config):
    given = loaded(config, None)
    assert not isinstance(given.pair.teacher, prefetch.PrefetchingTeacher)
    made = training(given, config)
    return steps_of(made), state_of(made)


def test_a_run_with_the_teacher_ahead_is_the_run_without_to_the_last_byte(config, monkeypatch):
    """And each micro-batch is the teacher's work once, none of it in the student's thread."""
    wanted, state = plain_run(config)
    given = loaded(config, "cpu:0")
    made = training(given, config)
    calls = counted(monkeypatch)
    assert steps_of(made) == wanted
    assert_same(state_of(made), state)
    assert len(calls) == NUM_STEPS * config.grad_accumulation
    assert len(set(calls)) == 1
    assert threading.get_ident() not in calls


def test_a_run_left_anywhere_and_gone_on_with_is_the_same_run(config):
    """One run, left after every step."""
    wanted, state = plain_run(config)
    given, kept, seen = loaded(config, "cpu:0"), None, []
    for _ in range(NUM_STEPS):
        made = training(given, config, kept)
        stream = iter(made)
        seen.append(next(stream))
        kept = copy.deepcopy((made.state_tensors(), made.state_values()))
        stream.close()
        assert given.pair.teacher._pending is None
    assert steps_of(seen) == wanted
    assert_same(state_of(made), state)


def test_the_teacher_reads_the_next_batch_before_the_student_is_through_with_this_one(settings, monkeypatch):
    """Shown by waiting for the teacher in the student's forward: without a second thread it would never come."""
    config = Config.from_dict({**settings, "grad_accumulation": 2})
    given = loaded(config, "cpu:0")
    made, total = training(given, config), 2 * NUM_STEPS
    begun = [threading.Event() for _ in range(total + 1)]
    begun[total].set()  # after the last batch there is none
    order, real, forward = iter(begun), given.pair.teacher.read, made.objective.forward
    monkeypatch.setattr(given.pair.teacher, "read", lambda *given: next(order).set() or real(*given))
    coming = iter(begun[1:])

    def wait_for_the_next(*given):
        assert next(coming).wait(20), "the teacher waits for the student"
        return forward(*given)

    monkeypatch.setattr(made.objective, "forward", wait_for_the_next)
    assert len(list(made)) == NUM_STEPS
    assert next(order, None) is begun[total]


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("call", [2, 3, 4])
def test_no_memory_on_either_side_halves_the_micro_batch(settings, monkeypatch, side, call):
    """In this step's micro-batch or in one made for the next step, the step is taken again and comes to the same."""
    config = Config.from_dict({**settings, "batch_size": 4, "grad_accumulation": 2})
    wanted, _ = plain_run(config)
    given = loaded(config, "cpu:0")
    made, count = training(given, config), [0]
    where, name = (given.pair.teacher, "read") if side == "teacher" else (made.objective, "forward")
    real = getattr(where, name)

    def failing(*what):
        count[0] += 1
        if count[0] == call:
            raise OUT_OF_MEMORY
        return real(*what)

    monkeypatch.setattr(where, name, failing)
    found = steps_of(made)
    assert [record["micro_batch"] for record in found] == [4] * ((call - 1) // 2) + [2] * (NUM_STEPS - (call - 1) // 2)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=1e-5)
        assert ours["num_tokens"] == theirs["num_tokens"]


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_used(settings, monkeypatch):
    config = Config.from_dict(settings)
    given = loaded(config, "cpu:0")
    made, real, count, done = training(given, config), given.pair.teacher.read, [0], []

    def failing(*what):
        count[0] += 1
        if count[0] == 3:
            raise ZeroDivisionError("the teacher fell over")
        return real(*what)

    monkeypatch.setattr(given.pair.teacher, "read", failing)
    with pytest.raises(ZeroDivisionError, match="the teacher fell over"):
        for record in made:
            done.append(record.step)
    assert done == [1, 2]
    assert given.pair.teacher._pending is None
    assert [record["step"] for record in steps_of(made)] == list(range(3, NUM_STEPS + 1))


def test_only_what_was_asked_for_is_taken(settings, monkeypatch):
    """A batch of its own, or other wants, are made at once; each comes to what the plain teacher says."""
    config = Config.from_dict(settings)
    plain, given = loaded(config, None).pair.teacher, loaded(config, "cpu:0")
    teacher, calls = given.pair.teacher, counted(monkeypatch)
    batch, other = (batching.collate(given.train[i : i + 2], *given.pair.pads) for i in (0, 2))
    again = batching.collate(given.train[:2], *given.pair.pads)
    taps = forward.Taps((0, 1))
    for asked, teacher_request, used, wanted, made in (
        (batch, {}, batch, {}, 2),  # what is not asked for is what the defaults say
        (batch, {"taps": taps, "spans": True}, batch, {"taps": taps, "spans": True}, 1),
        (batch, {"taps": taps, "spans": True}, batch.to("cpu"), {"taps": taps, "spans": True}, 1),
        (batch, {"taps": taps, "spans": False}, batch, {"taps": taps, "spans": True}, 2),
        (batch, {"taps": forward.Taps(), "spans": False}, other, {}, 2),
        (batch, {"taps": forward.Taps(), "spans": False}, again, {}, 2),
    ):
        calls.clear()
        teacher.prefetch(asked, **teacher_request)
        signal, told = teacher(used, **wanted), plain(used, **wanted)
        teacher._thread.submit(int).result()  # nothing is left to be done
        assert torch.equal(signal.hidden, told.hidden)
        assert not signal.hidden.is_inference()
        assert (signal.span_log_probs is None) == ("spans" not in wanted)
        assert all(torch.equal(a, b) for a, b in zip(signal.layers, told.layers, strict=True))
        assert len(signal.layers) == len(wanted.get("taps", forward.Taps()).layers)
        assert len(calls) in (made, 1)  # what was thrown away may not have begun


def test_the_thread_ends_with_its_teacher(settings):
    config, others = Config.from_dict(settings), set(threading.enumerate())
    given = loaded(config, "cpu:0")
    stream = iter(training(given, config))
    next(stream)
    (thread,) = set(threading.enumerate()) - others
    del stream, given
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_the_head_that_losses_decode_is_the_students_neighbour(settings):
    given = loaded(Config.from_dict(settings), "cpu:0")
    teacher = given.pair.teacher
    assert teacher.student_side_head.weight.data_ptr() != teacher.head.weight.data_ptr()
    assert torch.equal(teacher.student_side_head.weight, teacher.head.weight)
    assert given.validation.teacher_head is teacher.student_side_head
    assert inputs.make_objective(given.pair, Config.from_dict(settings)).teacher_head is teacher.student_side_head
    meta = teacher.head.on("meta")
    assert (meta.weight.device.type, teacher.head.weight.device.type) == ("meta", "cpu")


def test_a_whole_run_comes_to_the_same_verdict(settings, tmp_path, monkeypatch):
    kept = []
    for device in ("cpu", "cpu:0"):
        monkeypatch.setattr(devices, "teacher_device", lambda *_, device=device: torch.device(device))
        out = tmp_path / device.replace(":", "_")
        values = {**settings, "control": "off", "repeats": 1}
        list(session.distill(Config.from_dict(values), out))
        told = [
            {k: r.get(k) for k in ("loss", "bits_per_byte", "kl_to_teacher")}
            for r in files.read_records(out / "records.jsonl")
        ]
        kept.append((told, (out / "student" / "model.safetensors").read_bytes()))
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("wanted", "own", "cards", "processes", "device"),
    [
        ("auto", "cuda", 2, 1, "cuda:1"),
        ("auto", "cuda:0", 4, 1, "cuda:1"),
        ("auto", "cuda", 1, 1, "cuda"),
        ("auto", "cuda:1", 2, 2, "cuda:1"),
        ("auto", "cuda:0", 2, 2, "cuda:0"),
        ("auto", "cpu", 2, 1, "cpu"),
        ("auto", "cpu", 0, 1, "cpu"),
        ("cuda:0", "cuda", 2, 1, "cuda"),
        ("cuda", "cuda:0", 1, 1, "cuda:0"),
        ("cpu", "cuda", 1, 1, "cpu"),
        ("cuda:1", "cuda:0", 2, 2, "cuda:1"),
    ],
)
def test_the_teacher_takes_the_second_card_where_there_is_one(monkeypatch, wanted, own, cards, processes, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    machine = types.SimpleNamespace(device=torch.device(own), num_processes=processes)
    assert devices.teacher_device(wanted, machine) == torch.device(device)


def test_a_card_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    machine = types.SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    with pytest.raises(ValueError, match="teacher_device is cuda:1, but this machine has 1 GPUs; use auto or cpu"):
        devices.teacher_device("cuda:1", machine)


def test_a_teacher_on_the_processor_beside_a_card_reads_in_full_precision():
    for own, there, wanted in (("cuda", "cpu", torch.float32), ("cuda", "cuda:1", torch.float16)):
        machine = types.SimpleNamespace(device=torch.device(own), mixed_precision="fp16")
        assert devices.teacher_dtype(machine, there) is wanted
    on_cpu = types.SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16")
    assert devices.teacher_dtype(on_cpu, "cpu") is torch.bfloat16
