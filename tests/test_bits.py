"""Optimizer states and teachers of 8 and 4 bits: bitsandbytes where it is installed, a stand-in where it is not."""

import builtins
import itertools
import sys
import types

import pytest
import torch
import transformers
from families import byte_level, tiny_model

from kdlib import demo
from kdlib.config import Config
from kdlib.models import fingerprint
from kdlib.session import checkpoint, inputs, session
from kdlib.training import optimizer


class StandIn(torch.optim.Optimizer):
    """Momentum of 8 bits, kept and told as bitsandbytes does: tensors in a dict of their own, steps in plain numbers."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "t_alpha": None})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["state1"] = 0, torch.full_like(p, 128, dtype=torch.uint8)
                    state["absmax1"], state["qmap1"] = torch.zeros(1), torch.linspace(-1, 1, 256)
                assert type(state["step"]) is int and state["state1"].dtype == torch.uint8
                state["step"] += 1
                moment = state["qmap1"][state["state1"].long()] * state["absmax1"]
                moment.lerp_(p.grad, 1 - group["betas"][0])
                state["absmax1"] = moment.abs().max().reshape(1)
                state["state1"] = ((moment / state["absmax1"] + 1) * 127.5).round().to(torch.uint8)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * moment / state["absmax1"])

    def state_dict(self):
        told = super().state_dict()
        told["state"] = {i: {"step": entry["step"], "wrapped": entry} for i, entry in told["state"].items()}
        return told

    def load_state_dict(self, told):
        order = [p for group in self.param_groups for p in group["params"]]
        for group, known in zip(self.param_groups, told["param_groups"], strict=True):
            group.update({name: value for name, value in known.items() if name != "params"})
        for i, entry in told["state"].items():
            self.state[order[i]] = dict(entry)


def missing(monkeypatch):
    real = builtins.__import__

    def without(name, *given, **named):
        if name == "bitsandbytes":
            raise ModuleNotFoundError("No module named 'bitsandbytes'")
        return real(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.fixture(params=["stand-in", "real"])
def bits(request, monkeypatch):
    """A module `bitsandbytes`, or the real one."""
    if request.param == "real":
        pytest.importorskip("bitsandbytes")
    else:
        package = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=StandIn))
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    return request.param


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [
        ("optimizer", "adamw_8bit", "adamw"),
        ("teacher_quantization", "4bit", "none"),
        ("teacher_quantization", "8bit", "none"),
    ],
)
def test_without_the_package_one_line_says_what_to_do(settings, tmp_path, monkeypatch, key, value, default):
    missing(monkeypatch)
    with pytest.raises(ValueError) as error:
        list(session.distill(Config.from_dict({**settings, key: value}), tmp_path / "run"))
    assert str(error.value) == (
        f"{key} {value} needs bitsandbytes (No module named 'bitsandbytes'): pip install bitsandbytes, or set "
        f"{key} to {default}"
    )
    assert not (tmp_path / "run").exists()


def state_of(out):
    path, groups, *_ = checkpoint.newest(out / "checkpoints")
    return path.name, {
        f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()
    }


@pytest.mark.filterwarnings("ignore")  # whatever the real package warns of
def test_a_state_of_8_bits_survives_a_cut_to_the_last_byte(settings, tmp_path, bits):
    settings = {**settings, "optimizer": "adamw_8bit", "control": "off", "max_steps": 5, "kd_method": "projector"}
    list(session.distill(Config.from_dict(settings), tmp_path / "whole"))
    for cut in (2, 4):
        run = session.distill(Config.from_dict(settings), tmp_path / "cut")
        next(record for record in run if record["kind"] == "train" and record["step"] == cut)
        run.close()
    assert list(session.distill(Config.from_dict(settings), tmp_path / "cut"))[-1]["kind"] == "verdict"
    (name, wanted), (other, found) = (state_of(tmp_path / which) for which in ("whole", "cut"))
    assert name == other == "step-00000005"
    assert found.keys() == wanted.keys()
    assert {key.rsplit(".", 1)[1] for key in wanted if key.startswith("optimizer")} >= {
        "step",
        "state1",
        "absmax1",
        "qmap1",
    }
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)
    assert {found[key].dtype for key in found if key.endswith("state1")} >= {torch.uint8}


def test_a_run_stays_with_its_optimizer_and_with_its_teachers_bits(settings):
    """The state of one is none for the other, and a teacher of fewer bits says something else."""
    known = {"identity": None, "windows_per_step": 2, "versions": {}}
    of = [{**known, "config": Config.from_dict({**settings, **changes}).to_dict()} for changes in (
        {}, {"optimizer": "adamw_8bit"}, {"teacher_quantization": "8bit"}, {"teacher_quantization": "4bit"},
    )]  # fmt: skip
    for (i, then), (j, now) in itertools.product(enumerate(of), repeat=2):
        assert bool(fingerprint.diff_runs(then, now)[0]) == (i != j)


@pytest.mark.filterwarnings("ignore")
def test_the_state_of_8_bits_is_a_quarter(settings, bits):
    """A million weights and ten: 2 bytes and two scales in 256 for the large one; 8 for each of the ten."""
    large, small = torch.nn.Parameter(torch.zeros(1000, 1024)), torch.nn.Parameter(torch.zeros(10))
    objective = types.SimpleNamespace(student=torch.nn.ParameterList([large, small]), adapters=torch.nn.ParameterList())
    made = optimizer.make_optimizer(objective, Config.from_dict({**settings, "optimizer": "adamw_8bit"}))
    state, _ = optimizer.memory_of(made)
    assert state == 2 * 1_024_000 + 2 * 4 * 4_000 + 2 * 4 * 10
    plain = optimizer.make_optimizer(objective, Config.from_dict(settings))
    assert optimizer.memory_of(plain) == (8 * 1_024_010, 2 * 4 * 1_024_000)
    for p in (large, small):
        p.grad = torch.ones_like(p)
    made.step()
    kept = sum(
        t.numel() * t.element_size() for t in optimizer.state_tensors(made).values() if t.numel() not in (1, 256)
    )
    assert bits != "real" or kept == state
    assert optimizer.memory_of(made)[0] == 0


@pytest.fixture
def quantised(monkeypatch):
    """Models that are loaded as if bitsandbytes had quantised them; what the loader was told."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace())
    told, real = [], transformers.AutoModelForCausalLM.from_pretrained

    def load(source, dtype, output_loading_info, **more):
        model = real(source, dtype=dtype)
        told.append(more)
        if more:

            def refuse(*given):
                raise ValueError("`.to` is not supported for quantised models")

            model.is_quantized, model.to = True, refuse
        return model, {"missing_keys": set()}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    return told


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_teacher_of_few_bits_is_loaded_by_transformers_to_where_it_stays(settings, quantised, kind):
    inputs.load(Config.from_dict({**settings, "teacher_quantization": kind}), "cpu")
    told, student = quantised
    assert told["device_map"] == {"": "cpu"} and not student
    known = told["quantization_config"]
    assert (known.load_in_8bit, known.load_in_4bit) == (kind == "8bit", kind == "4bit")
    assert kind == "8bit" or (known.bnb_4bit_quant_type, known.bnb_4bit_compute_dtype) == ("nf4", torch.float32)


def test_a_quantised_model_is_told_by_what_was_left_whole():
    """The rounded weights may differ from one device to the next, and asking for a state_dict may spoil them."""
    model = tiny_model(byte_level())
    whole = fingerprint.fingerprint_model(model)
    model.is_quantized = True
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    model.state_dict = None
    known = fingerprint.fingerprint_model(model)
    assert known != whole
    layer.weight.data += 1
    assert fingerprint.fingerprint_model(model) == known
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert fingerprint.fingerprint_model(model) != known


def test_a_model_of_4_bits_is_not_the_same_one_of_8():
    """What was left whole is alike in both: a teacher cache of one must not be gone on with by the other."""
    found = []
    for kind in (torch.uint8, torch.int8):
        model = tiny_model(byte_level())
        model.is_quantized = True
        layer = model.model.layers[0].mlp.up_proj
        layer.weight = torch.nn.Parameter(torch.zeros(8, 4, dtype=kind), requires_grad=False)
        found.append(fingerprint.fingerprint_model(model))
    assert found[0] != found[1]


def test_a_quantised_head_is_refused(settings, monkeypatch, quantised):
    real = transformers.LlamaForCausalLM.get_output_embeddings

    def head(model):
        found = real(model)
        return types.SimpleNamespace(weight=found.weight.to(torch.int8)) if hasattr(model, "is_quantized") else found

    monkeypatch.setattr(transformers.LlamaForCausalLM, "get_output_embeddings", head)
    with pytest.raises(ValueError, match="its output head is quantised"):
        inputs.load(Config.from_dict({**settings, "teacher_quantization": "4bit"}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_real_teacher_of_few_bits_teaches(settings, tmp_path, kind, tied):
    """Its weights take less, its head is whole, its signal is near that of the whole teacher, and a run resumes."""
    pytest.importorskip("bitsandbytes")
    demo.save(tiny_model(byte_level(), 64, tie_word_embeddings=tied), byte_level(), tmp_path / "teacher")
    settings = {**settings, "teacher": str(tmp_path / "teacher"), "preset": "documents", "control": "off"}
    told = {}
    for how in ("none", kind):
        loaded = inputs.load(Config.from_dict({**settings, "teacher_quantization": how}))
        model = loaded.pair.teacher.model
        told[how] = sum(p.numel() * p.element_size() for p in model.parameters()), loaded.validation.signals[0].hidden
        assert model.get_output_embeddings().weight.dtype == torch.float32
    assert told[kind][0] < 0.8 * told["none"][0]
    similar = torch.nn.functional.cosine_similarity(told[kind][1], told["none"][1]).mean()
    assert {"8bit": 0.99, "4bit": 0.7}[kind] < similar < 0.99999
    settings["teacher_quantization"] = kind
    run = session.distill(Config.from_dict(settings), tmp_path / "run")
    next(record for record in run if record["kind"] == "train" and record["step"] == 2)
    run.close()
    found = list(session.distill(Config.from_dict(settings), tmp_path / "run"))
    assert (found[0]["resumed"], found[-1]["kind"]) == ("step-00000002", "verdict")
