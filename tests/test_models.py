import json

import pytest
import tokenizers
import torch
import transformers
from families import byte_level, tiny_model, unigram, word_piece

from kdlib import demo
from kdlib.align import vocab
from kdlib.config import Config
from kdlib.data import chat, tokenize
from kdlib.data.records import Document
from kdlib.models import forward, head, loading
from kdlib.models.head import Head
from kdlib.session import inputs


def family(kind, tokenizer, **changes):
    """A tiny random causal model of an architecture."""
    torch.manual_seed(0)
    rows = len(tokenizer)
    configs = {
        "llama": transformers.LlamaConfig(
            vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, **changes,
        ),
        "qwen3": transformers.Qwen3Config(
            vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, **changes,
        ),
        "gpt2": transformers.GPT2Config(vocab_size=rows, n_embd=16, n_layer=2, n_head=2, **changes),
        "gpt_neox": transformers.GPTNeoXConfig(
            vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **changes
        ),
    }  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(configs[kind])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
def test_models_load_as_they_were_saved_whole_or_in_shards(kind, tied, tmp_path):
    tokenizer = byte_level()
    model = family(kind, tokenizer, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = loading.load_model(str(tmp_path), "student")
    assert not loaded.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)
    reader = loading.load_reader(str(tmp_path), "student", loaded.config)
    head = Head(loaded, reader.vocabulary)
    ids = torch.tensor([[5, 9, 7]])
    mask = torch.ones_like(ids)
    expected = loaded(ids, attention_mask=mask).logits
    torch.testing.assert_close(head.decode(forward.last_hidden(loaded, ids, mask)), expected, atol=1e-5, rtol=1e-4)
    assert (head.module.weight is loaded.get_input_embeddings().weight) == tied
    assert reader.context == loaded.config.max_position_embeddings


def test_rows_beyond_the_tokenizer_get_no_probability(tmp_path):
    tokenizer = byte_level()
    demo.save(tiny_model(tokenizer, vocab_size=len(tokenizer) + 50), tokenizer, tmp_path)
    model = loading.load_model(str(tmp_path), "teacher")
    reader = loading.load_reader(str(tmp_path), "teacher", model.config)
    probs = Head(model, reader.vocabulary).decode(torch.zeros(1, 16)).softmax(-1)
    assert probs.shape == (1, len(tokenizer))
    assert probs.sum().item() == pytest.approx(1.0)


def refusal(source, match):
    with pytest.raises(ValueError, match=match) as caught:
        loading.load_model(str(source), "teacher")
    assert "\n" not in str(caught.value)


def test_an_encoder_is_refused(tmp_path):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    refusal(tmp_path, r"teacher .* is a BertForMaskedLM; expected a causal language model")


def test_a_model_that_sees_the_future_is_refused(tmp_path):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=False,
        initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertLMHeadModel(config)
    model.save_pretrained(tmp_path)
    refusal(tmp_path, r"attends to later tokens|of its output head")


def build(config, tmp_path, **changes):
    """Saves a random model of a configuration, and returns it loaded as a student."""
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }  # fmt: skip
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config(**{**sizes, **changes})).save_pretrained(tmp_path)
    return loading.load_model(str(tmp_path), "student")


TRANSFORMS = {
    "none": (transformers.LlamaConfig, {}, (1.0, 0.0)),
    "capped": (transformers.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 0.5}, (1.0, 0.5)),
    "capped, but too small to see it": (
        transformers.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 30.0, "initializer_range": 1e-3}, (1.0, 30.0),
    ),
    "divided": (transformers.GraniteConfig, {"logits_scaling": 13.0}, (1 / 13.0, 0.0)),
    "multiplied": (transformers.CohereConfig, {"logit_scale": 0.0625, "head_dim": 8}, (0.0625, 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_scale_and_a_cap_of_the_logits_are_found(name, tmp_path):
    config, changes, expected = TRANSFORMS[name]
    model = build(config, tmp_path, **changes)
    found = head.logits_transform(model)
    assert (found.scale, found.cap) == expected
    vocabulary = vocab.Vocabulary(tuple(b"%d" % i for i in range(40)), (), False)
    ids = torch.tensor([[5, 9, 7]])
    hidden = forward.last_hidden(model, ids, torch.ones_like(ids))
    logits = model(ids).logits
    torch.testing.assert_close(Head(model, vocabulary).decode(hidden), logits, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(Head(model, vocabulary).decoder()(hidden[0]), logits[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["none", "capped, but too small to see it", "divided"])
def test_half_precision_and_large_hidden_states_change_nothing(name, dtype, tmp_path):
    """The last hidden states reach several hundred, as those of some pretrained models do."""
    config, changes, expected = TRANSFORMS[name]
    model = build(config, tmp_path, **{"initializer_range": 0.02, **changes})
    if name != "capped, but too small to see it":  # Gemma's norm adds 1 to its weight
        model.model.norm.weight.data.fill_(300.0)
    model.save_pretrained(tmp_path / "half")
    found = head.logits_transform(loading.load_model(str(tmp_path / "half"), "teacher", dtype))
    assert (found.scale, found.cap) == expected


def test_other_functions_of_the_head_are_refused(tmp_path, monkeypatch):
    model = build(transformers.LlamaConfig, tmp_path)
    original = type(model).forward

    def squared(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits.square()
        return output

    monkeypatch.setattr(type(model), "forward", squared)
    refusal(tmp_path, "teacher .* logits are not a scaled or capped product of its output head")


def test_a_model_without_some_of_its_weights_is_refused(tmp_path):
    model = family("llama", byte_level(), tie_word_embeddings=False)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    refusal(tmp_path, "lacks 1 weights, among them lm_head.weight; expected a whole model")


def test_special_tokens_beyond_the_models_rows_are_left_out(tmp_path):
    tokenizer = byte_level()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    demo.save(tiny_model(tokenizer, vocab_size=rows), tokenizer, tmp_path)
    reader = loading.load_reader(str(tmp_path), "student", loading.load_config(str(tmp_path), "student"))
    assert reader.vocabulary.num_rows == rows
    document = Document("The cat <image> sat", (), "line 3")
    with pytest.raises(chat.RejectedConversation, match=r"line 3.* no row for the special token <image>"):
        tokenize.encode(document, reader)
    assert len(tokenize.encode(Document("The cat sat", (), "line 4"), reader))


def test_folders_without_a_model_or_tokenizer_are_refused(tmp_path):
    refusal(tmp_path, "cannot load its configuration")
    tiny_model(byte_level()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"student .* cannot load its tokenizer"):
        loading.load_reader(str(tmp_path), "student")


def test_a_tokenizer_of_special_tokens_alone_is_refused(tmp_path):
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    made_up = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    made_up.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"student .* cannot load its tokenizer: it has special tokens only"):
        loading.load_tokenizer(str(tmp_path), "student")


def test_broken_weights_are_refused(tmp_path):
    tiny_model(byte_level()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    refusal(tmp_path, "cannot load it as a causal language model")


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tmp_path):
    demo.save(tiny_model(byte_level()), unigram(), tmp_path)
    model = loading.load_model(str(tmp_path), "student")
    with pytest.raises(ValueError, match="the tokenizer belongs to another model"):
        loading.load_reader(str(tmp_path), "student", model.config)


def test_the_reader_knows_what_is_put_around_a_text(tmp_path):
    for tokenizer, prefix in ((unigram(), [1]), (byte_level(), []), (word_piece(), [2])):
        tokenizer.save_pretrained(tmp_path)
        reader = loading.load_reader(str(tmp_path), "student")
        assert reader.prefix == prefix
        assert reader.eos == ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def test_the_exported_student_is_a_plain_folder(tmp_path):
    from kdlib.session import finish

    tokenizer = unigram()
    model = tiny_model(tokenizer)
    finish.save_student(model, tokenizer, tmp_path / "student", "# card")
    finish.save_student(model, tokenizer, tmp_path / "student", "# newer card")
    assert (tmp_path / "student" / "README.md").read_text() == "# newer card"
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    assert again("The cat")["input_ids"] == tokenizer("The cat")["input_ids"]
    assert json.loads((tmp_path / "student" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_only_the_last_checkpoints_are_kept(tmp_path):
    from kdlib.session import checkpoint

    for step in (10, 200, 3000):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "other").mkdir()
    checkpoint.keep_last(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "step-00000200", "step-00003000"]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: transformers.LlamaConfig(), False),
        (lambda: transformers.Qwen2Config(), False),
        (lambda: transformers.Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=0), True),
        (lambda: transformers.MistralConfig(sliding_window=64), True),
        (lambda: transformers.MistralConfig(sliding_window=None), False),
        (lambda: transformers.Gemma2Config(), True),
        (lambda: transformers.LlamaConfig(
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), True),
    ],
)  # fmt: skip
def test_a_model_that_reads_long_rows_otherwise_is_tried_with_long_ones(made, expected):
    assert forward._depends_on_length(made()) is expected


def hybrid(rows):
    """A model with two recurrent layers to each layer of attention."""
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=rows, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "conv", "full_attention"],
    )  # fmt: skip
    return transformers.Lfm2ForCausalLM(config)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_attention_terms_on_layers_without_attention_are_refused_before_the_text_is_read(settings, tmp_path, side):
    tokenizer = {"student": unigram, "teacher": byte_level}[side]()
    demo.save(hybrid(len(tokenizer)), tokenizer, tmp_path / side)
    config = Config.from_dict({**settings, side: str(tmp_path / side), "attention_weight": 0.1, "attention_layers": 2})
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM has no attention to read in its layers 1; set attention_w"):
        inputs.load(config)
    assert inputs.load(config.replace(attention_layers=1)).pair.student


def test_windows_longer_than_a_table_of_positions_are_refused(settings, tmp_path):
    tokenizer = unigram()
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    demo.save(transformers.GPT2LMHeadModel(config), tokenizer, tmp_path / "student")
    changes = {**settings, "student": str(tmp_path / "student")}
    with pytest.raises(
        ValueError, match=r"max_length 40 is more than the 32 positions that the student .* has; set it to 32"
    ):
        inputs.load(Config.from_dict({**changes, "max_length": 40}))
    assert inputs.load(Config.from_dict({**changes, "max_length": 32})).pair.student


def test_a_model_to_which_padding_matters_is_refused(settings, monkeypatch):
    original = forward.last_hidden

    def backwards(model, ids, windows, packed=False):  # a state that runs from the end to the start
        return original(model, ids, windows, packed) + windows.float().sum(dim=1)[:, None, None] * (len(ids) > 1)

    monkeypatch.setattr(forward, "last_hidden", backwards)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM gives other hidden states for a window in a padded batch than"
    ):
        inputs.load(Config.from_dict(settings))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("")])
def test_a_probe_that_runs_out_of_memory_is_no_refusal_and_an_error_needs_no_message(settings, monkeypatch, error):
    def fails(model, ids, windows, packed=False):
        raise error

    monkeypatch.setattr(forward, "last_hidden", fails)
    model = tiny_model(byte_level())
    with pytest.raises(
        torch.OutOfMemoryError if str(error) else ValueError, match=r"out of memory|RuntimeError: Runtime"
    ):
        forward.check_padding(model, 8)
    with pytest.raises(
        torch.OutOfMemoryError if str(error) else ValueError, match=r"out of memory|RuntimeError: Runtime"
    ):
        loading.load_model(settings["student"], "student")
