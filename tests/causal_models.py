"""A tiny random model of every class that `AutoModelForCausalLM` knows, and what kdlib does with it.

python tests/causal_models.py        writes docs/models.md, about a quarter of an hour on one core
"""

import json
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

sys.path.insert(0, str(Path(__file__).parent.parent))
from families import LINES, byte_level, sentencepiece_bpe, tiny_model

from kdlib import cli, clock, demo
from kdlib.config import Config
from kdlib.data import batching
from kdlib.models import devices
from kdlib.session import finish, inputs
from kdlib.training.loop import TrainLoop

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MAX_WEIGHTS = 2e7
NAMES_BY_SIZE = {
    0: "num_nextn_predict_layers",
    1: "n_group topk_group mamba_n_groups n_groups first_k_dense_replace",
    2: "num_key_value_heads num_experts_per_tok linear_num_key_heads mamba_expand",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_local_experts "
    "num_experts n_routed_experts moe_num_experts qk_nope_head_dim qk_rope_head_dim rotary_dim linear_num_value_heads",
    8: "head_dim v_head_dim mamba_d_state state_size mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim "
    "linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size q_lora_rank kv_lora_rank patch_size",
    32: "hidden_size n_embd d_model dim n_embed word_embed_proj_dim embedding_size emb_dim sliding_window "
    "attention_window_size lru_width image_size",
    48: "intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim d_inner ffn_hidden_size mlp_hidden_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len",
}
SIZES = {name: size for size, names in NAMES_BY_SIZE.items() for name in names.split()}
ALSO_UNSET = ("num_key_value_heads", "head_dim")
"""Sizes that are set although their default is None."""
EXCEPTIONS = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layers_block_type": ["mamba", "attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "youtu": {"pad_token_id": None},  # transformers 5.24 sets its row to 0 whenever such a model is loaded
}
"""Sizes that fit the default configuration of one class only."""
WITHOUT = {"falcon": ["head_dim"], "xlstm": ["v_head_dim"], "prophetnet": ["num_hidden_layers"],
           "xlnet": ["max_position_embeddings"]}  # fmt: skip


def tiny_config(model_type, num_rows):
    """Returns a small configuration of a class."""
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**_sizes(config_class, num_rows))
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    for part in (config, config.get_text_config()):
        if hasattr(part, "initializer_range"):
            part.initializer_range = 0.2
    return config


def _sizes(config_class, num_rows):
    default, sizes = config_class(), {}
    for name, size in {**SIZES, "vocab_size": num_rows, "vocab_size_per_layer_input": num_rows}.items():
        value = _value(default, name)
        if (isinstance(value, int) and not isinstance(value, bool)) or (value is None and name in ALSO_UNSET):
            sizes[name] = size
    sizes |= {name: 0 for name in ("pad_token_id", "bos_token_id", "eos_token_id") if hasattr(default, name)}
    for name in getattr(config_class, "sub_configs", None) or {}:
        if _value(default, name) not in (None, False):
            sizes[name] = _sizes(type(getattr(default, name)), num_rows)
    if "qk_rope_head_dim" in sizes:  # multi-head latent attention has a key for each head
        sizes |= {name: 4 for name in ALSO_UNSET if name in sizes}
    sizes |= EXCEPTIONS.get(config_class.model_type, {})
    return {name: size for name, size in sizes.items() if name not in WITHOUT.get(config_class.model_type, ())}


def _value(config, name):
    try:
        return getattr(config, name, False)
    except Exception:  # noqa: BLE001 - attributes that differ between layers
        return False


class Bench:
    """A folder with a partner and a text for the models that are tried."""

    def __init__(self, folder):
        self.folder, self.tokenizer = Path(folder), byte_level()
        other = sentencepiece_bpe()
        demo.save(tiny_model(other), other, self.folder / "partner")
        text = [{"text": line * 3 + str(i)} for i, line in enumerate(LINES * 3)]
        (self.folder / "text.jsonl").write_text("\n".join(map(json.dumps, text)))

    def build(self, model_type):
        """Saves a model of a class. Raises if transformers cannot build it as small as this."""
        config = tiny_config(model_type, len(self.tokenizer))
        with torch.device("meta"):
            size = sum(w.numel() for w in transformers.AutoModelForCausalLM.from_config(config).parameters())
        if size > MAX_WEIGHTS:
            raise ValueError(f"{size / 1e6:.0f} million weights")
        torch.manual_seed(0)
        demo.save(transformers.AutoModelForCausalLM.from_config(config).eval(), self.tokenizer, self.folder / "model")

    def config(self, role):
        pair = (
            {"teacher": "partner", "student": "model"}
            if role == "student"
            else {"teacher": "model", "student": "partner"}
        )
        pair = {name: str(self.folder / folder) for name, folder in pair.items()}
        return Config(
            **pair, dataset=str(self.folder / "text.jsonl"), max_length=48, batch_size=2, max_steps=3, eval_tokens=200,
            check_teacher=False, share_steps=2,
        )  # fmt: skip

    def try_as(self, role):
        """Trains three steps with the model in a role, and checks what came of it. Raises ValueError for a refusal."""
        config = self.config(role)
        loaded = inputs.load(config)
        pair, student = loaded.pair, loaded.pair.student
        if role == "student":
            self._check_loss(loaded, config)
        loop = TrainLoop(
            inputs.make_objective(pair, config), pair.teacher, loaded.train, 3, config,
            devices.accelerator("fp32", cpu=True), clock.Clock(), pair.pads, pair.max_row_width,
        )  # fmt: skip
        assert all(record.loss > 0 and not record.skipped for record in loop)
        if role == "student":
            finish.save_student(student, pair.student_reader.tokenizer, self.folder / "exported")
            again = transformers.AutoModelForCausalLM.from_pretrained(self.folder / "exported").eval()
            ids = torch.arange(1, 9)[None]
            logits = [model(ids, use_cache=False).logits for model in (again, student.eval())]
            torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)

    @staticmethod
    def _check_loss(loaded, config):
        """Compares kdlib's cross-entropy of a window with that of the model's own logits."""
        pair = loaded.pair
        batch = batching.collate([loaded.train[0]], *pair.pads, (0, 0))
        counts = {"labels": int((batch.labels >= 0).sum()), "aligned": 1, "spans": 1}
        with torch.no_grad():
            _, parts, _ = inputs.make_objective(pair, config.control_config())(batch, None, counts)
            mask = (batch.student_windows > 0).long()
            logits = pair.student(batch.student_ids, attention_mask=mask, use_cache=False).logits[0]
        own = F.cross_entropy(logits[:, : pair.head.num_rows].float(), batch.labels[0], ignore_index=-100)
        torch.testing.assert_close(parts["lm"].float(), own, atol=1e-3, rtol=0.0)

    def outcomes(self, model_type):
        """Returns `{role: "works" or why not}` of a class; one entry `build` if it cannot be built here."""
        for name in ("model", "exported"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        try:
            self.build(model_type)
        except Exception as error:  # noqa: BLE001 - of transformers' own
            return {"build": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"}
        outcomes = {}
        for role in ("student", "teacher"):
            try:
                self.try_as(role)
                outcomes[role] = "works"
            except ValueError as error:
                outcomes[role] = "refused: " + str(error).partition("': ")[2].replace(str(self.folder), "")[:110]
        return outcomes


def page(outcomes):
    """Returns the Markdown page of `{model type: outcomes}`."""
    works = [name for name, found in outcomes.items() if set(found.values()) == {"works"}]
    unbuilt = [name for name, found in outcomes.items() if "build" in found]
    reasons = {}
    for name, found in outcomes.items():
        for text in found.values():
            if text.startswith("refused: "):
                reasons.setdefault(text.removeprefix("refused: "), {})[name] = None
    refused = {name for names in reasons.values() for name in names}
    return "\n".join([
        "<!-- Generated by `python tests/causal_models.py`. -->", "", "# Models", "",
        f"With transformers {transformers.__version__}: a tiny random model of every class of `AutoModelForCausalLM` is",
        "trained for three steps as the student of a teacher with another tokenizer, and is the teacher of such a",
        "student. kdlib's loss equals that of the model's own logits, and the exported student loads as it was.", "",
        f"## Work as student and as teacher ({len(works)})", "", _listed(works), "",
        f"## Refused before training ({len(refused)})", "", "| reason | model types |", "|---|---|",
        *(f"| {reason} | {_listed(names, 10**6)} |" for reason, names in reasons.items()), "",
        f"## Not tried ({len(unbuilt)})", "",
        "Their configuration cannot be made small by changing sizes alone, or their other parts (vision, audio) stay large:",
        "", _listed(unbuilt), "",
    ])  # fmt: skip


def _listed(names, width=120):
    return textwrap.fill(", ".join(f"`{name}`" for name in names), width)


def main():
    cli.quiet()
    torch.set_num_threads(1)
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder)
        for name in sys.argv[1:] or CLASSES:
            outcomes[name] = bench.outcomes(name)
            print(name, outcomes[name], flush=True)  # noqa: T201
    if not sys.argv[1:]:
        PAGE.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
