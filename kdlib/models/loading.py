"""Loads models and tokenizers, and refuses those that kdlib cannot train. Weights as CPU copies."""

import dataclasses
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kdlib import memory
from kdlib.align import vocab
from kdlib.data import tokenize
from kdlib.environment import first_line
from kdlib.models import devices, lora
from kdlib.models.head import logits_transform

CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of the names of classes that may hold a causal language model."""


def load_tokenizer(source, role):
    """Loads the fast tokenizer of a Hugging Face id or folder. Raises ValueError, which names the `role`, on failure."""
    try:
        has_tokenizer = (Path(source) / "tokenizer_config.json").is_file()
        tokenizer = transformers.AutoTokenizer.from_pretrained(source if has_tokenizer else lora.base_model(source))
    except Exception as error:  # noqa: BLE001 - any error of the loader is one of the id or folder
        raise ValueError(f"{role} {source!r}: cannot load its tokenizer: {first_line(error)}") from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):  # transformers 5.0 invents one if there is none
        raise ValueError(f"{role} {source!r}: cannot load its tokenizer: it has special tokens only")
    return tokenizer


def load_config(source, role):
    """Loads the configuration of a Hugging Face id or folder. Raises ValueError if it cannot be loaded."""
    try:
        return transformers.AutoConfig.from_pretrained(lora.base_model(source))
    except Exception as error:  # noqa: BLE001
        raise ValueError(f"{role} {str(source)!r}: cannot load its configuration: {first_line(error)}") from None


def load_model(source, role, dtype=torch.float32, device="cpu", quantization="none"):
    """Loads a causal language model in evaluation mode on `device`, quantised if `quantization` is `8bit` or `4bit`. Of
    a multimodal model, its text model is used.

    Raises ValueError if it fails to load, lacks weights, is not causal, or has logits that are not a function of its
    output head (`head.logits_transform`).
    """
    config, name = load_config(source, role), f"{role} {source!r}"
    base = lora.base_model(source)
    names = getattr(config, "architectures", None) or []
    causal = [name for name in names if name.endswith(CAUSAL) or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
    if config.is_encoder_decoder or (names and not causal):
        raise ValueError(f"{name} is a {', '.join(names) or config.model_type}; expected a causal language model")
    options = _quantization_options(f"{role}_quantization", quantization, dtype, device)
    if options and base != source:
        raise ValueError(f"{name} is a folder of adapters, which cannot be quantised; merge it into its model first")
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, output_loading_info=True, **options
        )
        model = lora.with_adapters_of(source, model)
    except Exception as error:  # noqa: BLE001
        reason = first_line(error)
        if reason.startswith("Unrecognized configuration class"):
            reason = f"transformers has none for {type(config).__name__}"
        raise ValueError(f"{name}: cannot load it as a causal language model: {reason}") from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{name} lacks {len(missing)} weights, among them {missing[0]}; expected a whole model")
    model.eval()
    try:
        logits_transform(model)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:
        if memory.is_out_of_memory(error):
            raise
        raise ValueError(f"{name}: cannot run it on text: {type(error).__name__}: {first_line(error)}") from None
    return model if options else model.to(device)  # a quantised model is there already and cannot be moved


def _quantization_options(key, quantization, dtype, device):
    """Returns the arguments of `from_pretrained` for quantised weights. The output head is not quantised, tied or not."""
    if quantization == "none":
        return {}
    devices.bitsandbytes(key, quantization, "none")
    options = {
        "8bit": {"load_in_8bit": True},
        "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
    }[quantization]
    return {"quantization_config": transformers.BitsAndBytesConfig(**options), "device_map": {"": str(device)}}


def load_reader(source, role, model_config=None):
    """Loads a model's `tokenize.TextTokenizer`. Raises ValueError if the model has no row for one of its tokens, unless
    all such tokens are special ones, which text does not use (Gemma 3's mark of an image).
    """
    tokenizer = load_tokenizer(source, role)
    vocabulary = vocab.read_vocabulary(tokenizer)
    model_config = model_config and model_config.get_text_config()
    rows = getattr(model_config, "vocab_size", None)
    if rows is not None and vocabulary.num_rows > rows and all(token is None for token in vocabulary.tokens[rows:]):
        gaps = tuple(index for index in vocabulary.gaps if index < rows)
        vocabulary = dataclasses.replace(vocabulary, tokens=vocabulary.tokens[:rows], gaps=gaps)
    if rows is not None and vocabulary.num_rows > rows:
        raise ValueError(
            f"{role} {source!r}: its tokenizer has ids up to {vocabulary.num_rows - 1}, its model only {rows} rows; "
            "the tokenizer belongs to another model"
        )
    return tokenize.wrap_tokenizer(tokenizer, vocabulary, getattr(model_config, "max_position_embeddings", 0) or 0)


def cpu_state_dict(model):
    """Returns copies of a module's weights and buffers on the CPU, tied ones once: `{name: tensor}`. Of a student with
    adapters (`lora.add_adapters`), only of what is trained.
    """
    seen, state = set(), {}
    for name, tensor in _tensors(model).items():
        storage = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() == 0 or storage not in seen:
            seen.add(storage)
            state[name] = tensor.detach().to("cpu", copy=True)
    return state


def _tensors(model):
    if not hasattr(model, "kdlib_trained"):
        return model.state_dict()
    weights = dict(model.named_parameters())
    return {name: weights[name] for name in model.kdlib_trained}


@torch.no_grad()
def load_cpu_state_dict(model, weights):
    """Loads the result of `cpu_state_dict` into a module. Raises ValueError if names or shapes do not fit."""
    own = _tensors(model)
    missing = {name for name in own.keys() - weights.keys() if own[name].data_ptr() not in
               {own[other].data_ptr() for other in weights if other in own}}  # fmt: skip
    misfits = sorted(missing | (weights.keys() - own.keys()))
    misfits += [name for name in weights.keys() & own.keys() if weights[name].shape != own[name].shape]
    if misfits:
        raise ValueError(f"these weights belong to another model: {', '.join(misfits[:3])} do not fit")
    for name, tensor in weights.items():
        own[name].copy_(tensor)
