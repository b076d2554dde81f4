"""Hooks that read layer outputs, and queries, keys and values of attention layers, in a forward pass.

Attention stays on torch's SDPA: the function registered here records its inputs and calls it. `output_attentions`
returns nothing under SDPA, and maps of all layers otherwise.
"""

import contextlib
import dataclasses

import torch
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

WATCHED_SDPA = "kdlib_watched_sdpa"


@dataclasses.dataclass
class Watched:
    """Tensors of one forward pass, by layer.

    `layers[i]`: output `[B, L, D]`. `attention[i]`: `(query, key, value, scaling)` after position encoding, `[B, H, L,
    d]` each. `attention_input`: the input of the lowest watched attention layer.
    """

    layers: dict
    attention: dict
    attention_input: torch.Tensor | None = None


def decoder_layers(model):
    """Returns the model's decoder layers. Raises ValueError if they cannot be identified."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers; its layers cannot be watched")


def watch_attention(model, on=True):
    """Switches the model's attention to the watched SDPA, or back. Raises ValueError if its class does not support it."""
    if (model.config._attn_implementation == WATCHED_SDPA) == on:
        return
    model.set_attn_implementation(WATCHED_SDPA if on else "sdpa")
    if on and model.config._attn_implementation != WATCHED_SDPA:
        raise ValueError(
            f"{type(model).__name__} does not support another attention function; set attention_weight and "
            "attention_alignment_weight to 0"
        )


@contextlib.contextmanager
def watch(model, layers=(), attention=()):
    """Returns a context with a `Watched` that the model fills while it runs. Layers are counted from 0."""
    watched = Watched({}, {})
    stack = decoder_layers(model) if layers or attention else ()
    handles, modules = [], {}
    for index in layers:
        handles.append(
            stack[index].register_forward_hook(lambda _, __, out, i=index: watched.layers.update({i: _first(out)}))
        )
    if attention:
        modules = {module: (watched, index) for index in attention for module in stack[index].modules()}
        handles.append(stack[min(attention)].register_forward_pre_hook(_record_input(watched), with_kwargs=True))
    _WATCHERS.update(modules)
    try:
        yield watched
    finally:
        for module in modules:
            _WATCHERS.pop(module, None)
        for handle in handles:
            handle.remove()


_WATCHERS = {}


def _record_input(watched):
    def hook(_, args, kwargs):
        watched.attention_input = args[0] if args else kwargs["hidden_states"]

    return hook


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _watched_sdpa(module, query, key, value, attention_mask, scaling=None, **rest):
    if module in _WATCHERS:
        watched, index = _WATCHERS[module]
        watched.attention[index] = query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **rest)


transformers.AttentionInterface.register(WATCHED_SDPA, _watched_sdpa)
# without a mask function of the same name the model would run without any mask, padding included
transformers.AttentionMaskInterface.register(WATCHED_SDPA, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
