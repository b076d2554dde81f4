"""Low-rank adapters: what is trained, kept, resumed and exported, with the real peft and bitsandbytes."""

import pytest
import torch
import transformers
from families import byte_level, gpt2, tiny_model, unigram
from test_resume import distil, state_of, untimed

from kdlib import demo, files
from kdlib.config import Config
from kdlib.models import loading, lora
from kdlib.session import checkpoint, experiment, finish, session
from kdlib.training import ema

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # peft on GPT-2's layers, which it corrects itself
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft.PeftModel
]
IDS = torch.tensor([[5, 9, 7, 11, 3, 8]])
BASE = {"teacher": "t", "student": "s", "dataset": "d", "lora_rank": 3}


def qwen2(tokenizer):
    """Biases in its attention, and a head of its own."""
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).eval()


def adapted(make, config):
    """A model with adapters that change its output, and the model as it was."""
    model, original = make(byte_level()), make(byte_level())
    lora.add_adapters(model, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.eval(), original


@pytest.mark.parametrize("make", [tiny_model, qwen2, gpt2])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"lora_rslora": True, "lora_alpha": 5.0}, {"lora_dora": True}, {"lora_init": "gaussian"},
        {"lora_init": "orthogonal", "lora_rank": 2}, {"lora_init": "olora"}, {"lora_init": "pissa"},
        {"train_embeddings": True},
    ],
    ids=lambda changes: " ".join(changes) or "default",
)  # fmt: skip
def test_the_merged_student_computes_what_the_adapted_one_does(make, changes, tmp_path):
    if make is gpt2 and changes.get("lora_init") == "olora":
        with pytest.raises(ValueError, match="olora does not support the layers of GPT2LMHeadModel; use default"):
            adapted(make, Config(**{**BASE, **changes}))
        return
    model, original = adapted(make, Config(**{**BASE, **changes}))
    expected = model(IDS).logits
    assert (expected - original(IDS).logits).abs().max() > 1e-2
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    plain = lora.merged(model)
    assert type(plain) is type(original)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())  # and it trains on
    finish.save_student(plain, byte_level(), tmp_path / "student")
    loaded = loading.load_model(str(tmp_path / "student"), "student")
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny_model, qwen2, gpt2])
@pytest.mark.parametrize("changes", [{}, {"lora_dora": True}, {"lora_rslora": True}], ids=["lora", "dora", "rslora"])
def test_the_adapters_alone_are_loaded_by_peft_and_by_kdlib(make, changes, tmp_path):
    tokenizer = byte_level()
    demo.save(make(tokenizer), tokenizer, tmp_path / "base")
    config = Config(**{**BASE, **changes, "student": str(tmp_path / "base")})
    model, original = adapted(make, config)
    (tmp_path / "adapter").mkdir()
    lora.save_adapters(model, config, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {lora.CONFIG_FILE, lora.WEIGHTS_FILE}
    expected = model(IDS).logits
    loaded = peft.PeftModel.from_pretrained(original, str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(IDS).logits, expected)
    again = loading.load_model(str(tmp_path / "adapter"), "student")
    torch.testing.assert_close(again(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert not hasattr(again, "peft_config")
    assert loading.load_tokenizer(str(tmp_path / "adapter"), "student").get_vocab() == tokenizer.get_vocab()


def test_adapters_begin_as_nothing_and_depend_on_the_seed_alone():
    models = [lora.add_adapters(tiny_model(byte_level()), Config(**BASE, seed=seed)) for seed in (4, 4, 5)]
    original = tiny_model(byte_level())
    random_state = torch.get_rng_state()
    assert all(torch.equal(model(IDS).logits, original(IDS).logits) for model in models)
    first, same, other = (loading.cpu_state_dict(model) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(random_state, torch.get_rng_state())


def test_the_frozen_weights_are_neither_kept_nor_trained_nor_averaged_twice():
    model = lora.add_adapters(tiny_model(byte_level()), Config(**BASE))
    names = set(loading.cpu_state_dict(model))
    assert names == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(names) == 28 and all(".lora_A." in name or ".lora_B." in name for name in names)
    averaged = ema.average(model, 0.9)
    shared = {weight.data_ptr() for weight in model.parameters()} & {w.data_ptr() for w in averaged.module.parameters()}
    assert len(shared) == sum(not weight.requires_grad for weight in model.parameters())
    averaged.update_parameters(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(1.0) if name in names else None
    averaged.update_parameters(model)  # the second step: a decay of 2 / 11
    assert set(loading.cpu_state_dict(averaged.module)) == names
    for name, mean in averaged.module.named_parameters():
        own = dict(model.named_parameters())[name]
        torch.testing.assert_close(mean, own - 2 / 11 if name in names else own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0, "lora_alpha": 16.0}, "lora_alpha is 16.0, but lora_rank is 0"),
        ({"lora_rank": 0, "train_embeddings": True}, "train_embeddings is True, but lora_rank is 0"),
        ({"lora_rank": 0, "student_quantization": "4bit"}, "student_quantization is 4bit, but lora_rank is 0"),
        ({"student_quantization": "4bit", "lora_dora": True}, "lora_dora changes the weights that student_quant"),
        ({"student_quantization": "8bit", "lora_init": "pissa"}, "lora_init pissa changes the weights"),
        ({"lora_init": "zeros"}, "unknown lora_init 'zeros'"),
    ],
)
def test_settings_that_can_not_work_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        Config(**{**BASE, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("query", "'query' matches no layer of LlamaForCausalLM; it has down_proj, gate_proj, k_proj, lm_head"),
        ("q_proj,lm_head", "includes the output head; leave it out, or train it with train_embeddings"),
    ],
)
def test_targets_that_fit_nothing_are_refused_before_anything_is_loaded(
    settings, tmp_path, monkeypatch, targets, message
):
    monkeypatch.setattr(loading, "load_model", None)
    config = Config.from_dict({**settings, "lora_rank": 2, "lora_targets": targets})
    with pytest.raises(ValueError, match=message) as error:
        list(session.distill(config, tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


PLAN = {"max_steps": 10, "eval_steps": 2, "lora_rank": 2, "lora_dropout": 0.1, "control": "full", "use_ema": True}


def test_a_run_cut_off_anywhere_ends_with_the_same_adapters(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.Experiment, "_step_cost_ratio", lambda self: 1.0)  # else by the clock
    settings = {**settings, **PLAN}
    distil(settings, tmp_path / "whole")
    for cut_at in (1, 5, 9, 14, 19):
        distil(settings, tmp_path / f"cut-{cut_at}", cut_at)
        distil(settings, tmp_path / f"cut-{cut_at}")
        assert state_of(tmp_path / f"cut-{cut_at}") == state_of(tmp_path / "whole")
        assert untimed(tmp_path / f"cut-{cut_at}") == untimed(tmp_path / "whole")


def test_a_run_exports_a_plain_student_and_its_adapters(settings, tmp_path):
    settings = {**settings, **PLAN}
    result = distil(settings, tmp_path / "run")[-1]
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    base = transformers.AutoModelForCausalLM.from_pretrained(settings["student"])
    names = {name for name, _ in student.named_parameters()}
    assert names == {name for name, _ in base.named_parameters()}
    alone = peft.PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    torch.testing.assert_close(student(IDS).logits, alone(IDS).logits, atol=1e-5, rtol=1e-5)
    _, groups, *_ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    sizes = {group: checkpoint.size_of(tensors) for group, tensors in groups.items()}
    assert max(sizes.values()) < 0.6 * (tmp_path / "run" / "student" / "model.safetensors").stat().st_size
    assert result["kind"] == "verdict"
    assert files.read_json(tmp_path / "run" / "verdict.json")["bits_per_byte"]["ce_only"] > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_student_is_trained_by_its_adapters_and_exported_whole(settings, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    tokenizer = unigram()
    demo.save(tiny_model(tokenizer, 64, seed=3), tokenizer, tmp_path / "student")
    settings = {
        **settings,
        **PLAN,
        "control": "off",
        "student": str(tmp_path / "student"),
        "learning_rate": 5e-3,
        "student_quantization": bits,
    }
    distil(settings, tmp_path / "run")
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert student.dtype == torch.float32 and not getattr(student, "is_quantized", False)
    scores = files.read_json(tmp_path / "run" / "verdict.json")["bits_per_byte"]
    assert scores["distilled"] < scores["student_before"]
    distil(settings, tmp_path / "cut", 3)
    distil(settings, tmp_path / "cut")
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "run")
