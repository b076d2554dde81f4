"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) of a student, whose own weights stay frozen. By `peft`."""

import contextlib
import copy
import json
import warnings
from pathlib import Path

import torch
import transformers

ADAPTER = "default"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def add_adapters(student, config):
    """Adds trainable adapters to a student, in place, and freezes its own weights. Returns the student.

    With `train_embeddings`, embeddings and output head are trained as a whole, in float32. The names of all trained
    weights become `student.kdlib_trained`. The initial adapters depend on `seed` only, and change no output. Raises
    ValueError if `lora_targets` match no layer, or the output head.
    """
    peft = _peft(config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            with _without_warnings():
                peft.inject_adapter_in_model(_settings(peft, config), student, ADAPTER)
        except ValueError as error:
            if "not found in the base model" not in str(error):
                raise
            linear = {name.rpartition(".")[2] for name, m in student.named_modules() if isinstance(m, torch.nn.Linear)}
            raise ValueError(
                f"lora_targets {config.lora_targets!r} matches no layer of {type(student).__name__}; it has "
                f"{', '.join(sorted(linear))}; or use all-linear"
            ) from None
    if _is_adapted(student.get_output_embeddings()):
        raise ValueError("lora_targets includes the output head; leave it out, or train it with train_embeddings")
    adapted = [module for module in student.modules() if _is_adapted(module)]
    if config.lora_init == "olora" and any(
        isinstance(m.base_layer, transformers.pytorch_utils.Conv1D) for m in adapted
    ):
        raise ValueError(f"lora_init olora does not support the layers of {type(student).__name__}; use default")
    if config.train_embeddings:
        for module in (student.get_input_embeddings(), student.get_output_embeddings()):
            module.float().weight.requires_grad_()
    student.kdlib_trained = tuple(name for name, weight in student.named_parameters() if weight.requires_grad)
    return student


def check_adapters(config):
    """Raises ValueError if the student of `config` cannot get its adapters. Reads its configuration only."""
    if not config.lora_rank or not config.student:
        return
    _peft(config)
    base = base_model(config.student)
    with torch.device("meta"):
        try:
            skeleton = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(base))
        except Exception:  # noqa: BLE001 - loading the model reports it
            return
        add_adapters(skeleton, config)


def base_model(source):
    """Returns the model that a folder of adapters belongs to, or `source` itself."""
    path = Path(source) / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"] if path.is_file() else source


def with_adapters_of(source, model):
    """Returns `model` with the adapters of the folder `source` merged into its weights, if it is such a folder."""
    if not (Path(source) / CONFIG_FILE).is_file():
        return model
    import peft

    with _without_warnings():
        return peft.PeftModel.from_pretrained(model, source).merge_and_unload()


@torch.no_grad()
def merged(student):
    """Returns the student to save: a plain float32 model on the CPU with the adapters merged into its weights, which has
    no buffers to run with. Returns a student without adapters as it is.
    """
    if not hasattr(student, "kdlib_trained"):
        return student
    config = copy.deepcopy(student.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(student)(config)
    state = {}
    for name in plain.state_dict():
        path, _, leaf = name.rpartition(".")
        module = student.get_submodule(path)
        tensor = _merged_weight(module) if _is_adapted(module) and leaf == "weight" else _plain_tensor(module, leaf)
        state[name] = tensor.to("cpu", torch.float32) if tensor.is_floating_point() else tensor.cpu()
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = student.generation_config
    return plain


def save_adapters(student, config, path):
    """Writes the adapters as a folder that `peft` loads onto the original student. `path` is an existing folder."""
    import peft
    import safetensors.torch

    settings = _settings(peft, config)
    settings.base_model_name_or_path, settings.inference_mode = config.student, True
    settings.target_modules = student.peft_config[ADAPTER].target_modules
    settings.save_pretrained(path)
    weights = dict(student.named_parameters())
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}', '')}": weights[name].detach().cpu().contiguous()
        for name in student.kdlib_trained
    }
    safetensors.torch.save_file(tensors, Path(path) / WEIGHTS_FILE)


@contextlib.contextmanager
def _without_warnings():
    """Silences peft, which warns of its own use of deprecated names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _is_adapted(module):
    return hasattr(module, "base_layer")


def _merged_weight(module):
    from peft.utils.integrations import dequantize_module_weight

    if not module.base_layer.weight.is_floating_point():
        weight = dequantize_module_weight(module.base_layer)
        return weight.float() + module.get_delta_weight(ADAPTER).float()
    layer = copy.deepcopy(module).float()  # one layer at a time; the student keeps its exact weights
    layer.merge(adapter_names=[ADAPTER])
    return layer.base_layer.weight.detach()


def _plain_tensor(module, leaf):
    """Returns a weight or buffer of a module without its adapters."""
    base = module.base_layer if _is_adapted(module) else module
    tensor = getattr(base, leaf).detach()
    if leaf == "weight" and not tensor.is_floating_point():
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(base)
    return tensor


def _settings(peft, config):
    targets = config.lora_targets
    return peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha or 2 * config.lora_rank, lora_dropout=config.lora_dropout,
        target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        init_lora_weights=True if config.lora_init == "default" else config.lora_init, use_dora=config.lora_dora,
        use_rslora=config.lora_rslora,
    )  # fmt: skip


def _peft(config):
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"lora_rank {config.lora_rank} needs peft ({error}): pip install peft, or set it to 0"
        ) from None
    return peft
