"""What a machine with a GPU meets, seen without one: one process makes several `Accelerator`s, and cards are stand-ins."""

import ast
import contextlib
import functools
import json
import re
import types
from pathlib import Path

import accelerate
import pytest
import torch
from families import LINES
from processes import together

from kdlib import cli, demo, doctor, machine, memory
from kdlib.config import Config
from kdlib.evaluation import samples
from kdlib.files import read_json
from kdlib.models import devices
from kdlib.session import session

HOUSE = Path(__file__).parent.parent
GIB = 2**30
KERNELS = ("sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CARDS = {
    "T4": ("Tesla T4", 15 * GIB, (7, 5), False),
    "P100": ("Tesla P100-PCIE-16GB", 16 * GIB, (6, 0), False),
    "A100": ("NVIDIA A100-SXM4-40GB", 40 * GIB, (8, 0), True),
    "H200": ("NVIDIA H200", 141 * GIB, (9, 0), True),
}
"""Name, bytes, compute capability, whether it has units for bf16."""
SMALL = {"max_steps": 2, "max_length": 48, "batch_size": 2, "eval_tokens": 300, "eval_steps": 2, "check_teacher": False}
SMALL |= {"control": "off"}


def put_in(monkeypatch, names, kernels=KERNELS):
    """Make torch tell of these cards. Nothing can be computed on them."""
    cards = [CARDS[name] for name in names]

    def properties(index=0):
        name, size, (major, minor), _ = cards[torch.device(index).index or 0 if isinstance(index, str) else index]
        return types.SimpleNamespace(name=name, total_memory=size, major=major, minor=minor)

    told = {
        "is_available": lambda: True,
        "device_count": lambda: len(cards),
        "get_device_properties": properties,
        "get_device_name": lambda index=0: properties(index).name,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or cards[0][3],
        "get_arch_list": lambda: list(kernels),
        "mem_get_info": lambda device=None: (cards[0][1] - GIB, cards[0][1]),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "device": lambda index: contextlib.nullcontext(),
    }
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    probe = machine.probe
    monkeypatch.setattr(machine, "probe", lambda device: probe("cpu"))


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr(samples, "continue_text", functools.partial(samples.continue_text, num_tokens=2))


@pytest.fixture
def small_default(tmp_path_factory, monkeypatch):
    """An embedded default whose teacher takes three steps on a few lines."""
    monkeypatch.setenv("KDLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(demo, "docstrings", lambda *_: {f"m{i}.py": LINES[i % 6] + f" {i}" for i in range(150)})
    monkeypatch.setitem(demo.TEACHER, "vocab", 320)
    monkeypatch.setitem(demo.STUDENT, "vocab", 400)
    monkeypatch.setattr(demo, "prepare", functools.partial(demo.prepare, steps=3))


def test_an_accelerator_is_made_in_one_place():
    files = [path for folder in ("kdlib", "benchmarks") for path in (HOUSE / folder).rglob("*.py")]
    files += [*(HOUSE / "notebooks").glob("*.ipynb"), *(HOUSE / "kaggle").glob("*.py")]
    made = [path.name for path in files if re.search(r"Accelerator\(|import Accelerator", path.read_text("utf-8"))]
    assert made == ["devices.py"]


@pytest.mark.parametrize(
    ("names", "arithmetic", "teacher"),
    [
        (["T4"], "fp16", "cuda"),
        (["P100"], "fp16", "cuda"),
        (["A100"], "bf16", "cuda"),
        (["H200"], "bf16", "cuda"),
        (["T4", "T4"], "fp16", "cuda:1"),
    ],
)
def test_what_a_card_computes_in_is_what_it_has_units_for(monkeypatch, names, arithmetic, teacher):
    put_in(monkeypatch, names)
    made = devices.accelerator("auto")
    assert (made.mixed_precision, made.device.type) == (arithmetic, "cuda")
    assert (made.scaler is not None) == (arithmetic == "fp16")
    assert devices.teacher_device("auto", made) == torch.device(teacher)
    assert devices.teacher_device("cpu", made) == torch.device("cpu")
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[arithmetic]
    assert devices.teacher_dtype(made, teacher) == half
    assert devices.teacher_dtype(made, "cpu") == torch.float32
    with pytest.raises(ValueError, match=f"cuda:2, but this machine has {len(names)} GPUs"):
        devices.teacher_device("cuda:2", made)
    assert memory.usage(made.device) == {"used_bytes": GIB, "total_bytes": CARDS[names[0]][1]}


@pytest.mark.parametrize("names", [["T4"], ["P100"], ["A100"], ["H200"], ["T4", "T4"]])
def test_the_doctor_says_of_a_card_what_a_run_does_on_it(monkeypatch, names):
    put_in(monkeypatch, names)
    found = {finding.name: finding for finding in doctor.diagnose(Config())}
    named = "GPUs 0, 1" if len(names) > 1 else "GPU 0"
    name, size, capability, _ = CARDS[names[0]]
    assert found[named].value.startswith(name) and found[named].number == size
    assert found[f"precision, {named}"].value == devices.accelerator("auto").mixed_precision
    assert found[f"kernels, {named}"].state == "ok"
    assert (found[f"Triton, {named}"].value == "supported") == (capability >= (7, 0))
    assert ("teacher device" in found) == (devices.teacher_device("auto", devices.accelerator("auto")).index == 1)


def test_the_doctor_sees_a_build_without_kernels_for_the_card(monkeypatch):
    put_in(monkeypatch, ["P100"], kernels=("sm_75", "sm_80", "sm_90"))
    found = {finding.name: finding for finding in doctor.diagnose(Config())}
    assert (found["kernels, GPU 0"].state, found["kernels, GPU 0"].value) == ("warning", "work in a short test")
    assert "sm_60 is not among them" in found["kernels, GPU 0"].meaning


@pytest.mark.parametrize(("names", "arithmetic"), [(["T4"], "fp16"), (["A100"], "bf16")])
def test_after_an_accelerator_for_the_processor_the_card_is_taken(monkeypatch, names, arithmetic):
    put_in(monkeypatch, names)
    first = devices.accelerator("fp32", cpu=True)
    second = devices.accelerator("auto")
    assert (second.device.type, second.mixed_precision) == ("cuda", arithmetic)
    assert (first.device.type, first.mixed_precision, first.scaler) == ("cpu", "no", None)
    assert devices.accelerator("auto", cpu=True).mixed_precision == "no"
    with pytest.raises(ValueError, match="fp16 needs a CUDA GPU"):
        devices.accelerator("fp16", cpu=True)


@pytest.mark.parametrize(("names", "arithmetic"), [(["T4"], "fp16"), (["A100"], "bf16")])
def test_after_the_demos_preparation_a_card_may_be_used(monkeypatch, small_default, names, arithmetic):
    """The preparation trains on the CPU in fp32, whatever card there is."""
    put_in(monkeypatch, names)
    demo.demo_config(3, 2000, 5000)
    made = devices.accelerator("auto")
    assert (made.device.type, made.mixed_precision) == ("cuda", arithmetic)


def test_a_machine_told_to_use_its_processor_has_no_cards_arithmetic(monkeypatch):
    put_in(monkeypatch, ["T4"])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    made = devices.accelerator("auto")
    assert (made.device.type, made.mixed_precision) == ("cpu", "no")
    with pytest.raises(ValueError, match="fp16 needs a CUDA GPU"):
        devices.accelerator("fp16")


def test_an_accelerator_in_use_keeps_its_arithmetic_when_another_is_made(monkeypatch):
    """accelerate asks the state of the process for it, in `autocast` and in `prepare`."""
    put_in(monkeypatch, ["T4"])
    half, whole = devices.accelerator("fp16"), devices.accelerator("bf16")
    for made, dtype in ((half, torch.float16), (whole, torch.bfloat16), (half, torch.float16)):
        with made.autocast():
            assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == dtype
    for made, name in ((half, "fp16"), (whole, "bf16"), (half, "fp16")):
        optimizer = made.prepare(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1))
        assert optimizer.accelerator_state.mixed_precision == made.mixed_precision == name
        assert optimizer.scaler is made.scaler


def test_an_accelerator_that_is_refused_changes_nothing(monkeypatch):
    made = devices.accelerator("bf16")
    with pytest.raises(ValueError, match="Unknown mixed_precision"):
        devices.accelerator("int3")
    assert accelerate.state.AcceleratorState._shared_state is made.states[1]


def test_a_temporary_accelerator_leaves_what_was_chosen_before():
    before = accelerate.Accelerator(cpu=True)
    with devices.temporary_accelerator("bf16") as made:
        assert accelerate.state.AcceleratorState().mixed_precision == made.mixed_precision == "bf16"
    assert accelerate.state.AcceleratorState().mixed_precision == before.mixed_precision
    abandoned = devices.temporary_accelerator("bf16")
    abandoned.__enter__()
    later = devices.accelerator("fp32")
    abandoned.__exit__(None, None, None)  # as the collector may do at any time
    assert accelerate.state.AcceleratorState._shared_state is later.states[1]


def losses_of(settings, out):
    return [r["loss"] for r in session.distill(Config.from_dict(settings), out) if r["kind"] == "train"]


def test_what_others_left_half_done_with_accelerate_does_not_stop_the_training(settings, tmp_path):
    """accelerate's optimizer takes no step while the state of the process says that gradients are still accumulated."""
    settings = {**settings, "control": "off", "max_steps": 3, "kd_method": "first_token"}
    wanted = losses_of(settings, tmp_path / "one")
    other = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    with other.accumulate(torch.nn.Linear(1, 1)):
        assert not other.sync_gradients
    assert losses_of(settings, tmp_path / "two") == wanted
    assert not other.sync_gradients


def test_a_session_in_the_middle_of_another_changes_neither(settings, tmp_path):
    """Both train two students, each in its own arithmetic."""
    two = {**settings, "control": "off", "repeats": 2, "max_steps": 2, "kd_method": "first_token"}
    one = {**two, "amp_dtype": "bf16"}
    wanted = [losses_of(values, tmp_path / f"alone-{i}") for i, values in enumerate((one, two))]
    assert wanted[0] != wanted[1]
    running = session.distill(Config.from_dict(one), tmp_path / "outer")
    found = []
    for record in running:
        found += [record["loss"]] if record["kind"] == "train" else []
        if len(found) == 1:
            break
    assert losses_of(two, tmp_path / "inner") == wanted[1]
    assert [*found, *(record["loss"] for record in running if record["kind"] == "train")] == wanted[0]


def in_a_launch():
    with devices.temporary_accelerator("bf16"):
        pass
    assert accelerate.PartialState().num_processes == 2  # what accelerate's functions ask
    first = devices.accelerator("fp32", cpu=True)
    group = torch.distributed.group.WORLD
    for amp_dtype in ("bf16", "fp32"):
        made = devices.accelerator(amp_dtype)
        assert made.num_processes == first.num_processes == 2
        assert made.reduce(torch.ones(1), "sum").item() == 2.0
    with devices.temporary_accelerator("bf16", cpu=True) as made:
        assert made.num_processes == 2
    assert torch.distributed.group.WORLD is group
    assert accelerate.PartialState().num_processes == 2


def test_the_process_group_of_a_launch_is_kept():
    together(2, in_a_launch)


def test_in_a_launch_all_processes_share_a_kind_of_device(monkeypatch):
    made = []
    monkeypatch.setattr(devices, "Accelerator", lambda **settings: made.append(settings))
    devices.accelerator("fp32", cpu=True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    devices.accelerator("fp32", cpu=True)
    assert [settings["cpu"] for settings in made] == [True, False]


def flags(values):
    return [
        word
        for name, value in values.items()
        for word in (f"--{name.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value))
    ]


def command(name, settings, out):
    """A run of the command line as a function of its arithmetic."""
    plain = {key: settings[key] for key in ("teacher", "student", "dataset", "max_length")}
    values = {"demo": SMALL, "evaluate": plain}.get(name, {**settings, "max_steps": 2, "control": "off"})
    where = [] if name in ("doctor", "evaluate") else ["--out", str(out)]
    return [name, *flags(values), *where]


@pytest.mark.parametrize("name", ["demo", "distill", "doctor", "cache", "evaluate"])
def test_every_command_runs_in_any_arithmetic_after_any_other(settings, small_default, tmp_path, name, capsys):
    devices.accelerator("fp32", cpu=True)
    for amp_dtype in ("bf16", "fp32"):
        words = [*command(name, settings, tmp_path / amp_dtype), "--amp-dtype", amp_dtype]
        assert cli.main(words) == 0, capsys.readouterr().err


DRIVES = r"guard\(|distill\(|^from kdlib|^import sys|^small = "


def calls_of(notebook):
    """The code of a notebook that drives kdlib, cell by cell, with its imports and parameters; figures are left out."""
    for cell in json.loads((HOUSE / "notebooks" / f"{notebook}.ipynb").read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(DRIVES, source, re.MULTILINE):
            yield source


def changed(source, values):
    """The source with other values for the names that it assigns literals to, as papermill would inject them."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id in values:
            node.value = ast.parse(repr(values[node.targets[0].id]), mode="eval").body
    return compile(ast.fix_missing_locations(tree), "notebook", "exec")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("losses_compared", "results", "teacher_cache")]


@pytest.mark.parametrize("name", ["distill", *SLOW])
def test_every_notebook_runs_in_any_arithmetic_after_any_other(small_default, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for amp_dtype in ("bf16", "fp32"):
        values = {
            "small": {**SMALL, "amp_dtype": amp_dtype},
            "out": amp_dtype,
            "methods": ["first_token"],
            "parts": {},
        }
        values |= {"compared_steps": 2, "teacher_steps": 3, "text_chars": 5000, "student_chars": 1500}
        names = {}
        first, *cells = calls_of(name)
        exec(changed(first, values), names)
        for source in cells:
            exec(compile(source.replace('"small-run"', repr(amp_dtype)), name, "exec"), names)
        (status, *_) = sorted(tmp_path.glob(f"{amp_dtype}*/**/status.json")) or [tmp_path / "status.json"]
        assert read_json(status)["state"] == "complete"
        assert read_json(status.parent / "config.json")["amp_dtype"] == amp_dtype
