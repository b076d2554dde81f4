"""Watching a running model: outputs of chosen layers; queries, keys and values of chosen attentions.

Attention stays on torch's SDPA: the function registered here notes what passes by and hands it on. `output_attentions`
would give nothing under SDPA, and maps of all layers otherwise.
"""

import contextlib
import dataclasses

import torch
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

WATCHED_SDPA = "kdlib_watched_sdpa"


@dataclasses.dataclass
class Seen:
    """What one forward pass left: `layers[i]` the output `[B, L, D]` of layer i, `attention[i]` its `(query, key, value,
    scaling)` after position encoding, `[B, H, L, d]` each, `below` what the lowest watched attention's layer was given.
    """

    layers: dict
    attention: dict
    below: torch.Tensor | None = None


def decoder_layers(model):
    """The model's decoder layers, in order; ValueError where it has none that can be told."""
    count = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers; its layers can't be watched")


def watch_attention(model, on=True):
    """Route the model's attention through the watched SDPA, or back to torch's own; ValueError where its class can't be set
    to another function.
    """
    if (model.config._attn_implementation == WATCHED_SDPA) == on:
        return
    model.set_attn_implementation(WATCHED_SDPA if on else "sdpa")
    if on and model.config._attn_implementation != WATCHED_SDPA:
        raise ValueError(
            f"{type(model).__name__} does not take another attention function; set attention_weight and "
            "attention_alignment_weight to 0"
        )


@contextlib.contextmanager
def watch(model, layers=(), attention=()):
    """A `Seen` that fills while the model runs inside the block. Layers are counted from 0."""
    seen = Seen({}, {})
    stack = decoder_layers(model) if layers or attention else ()
    handles, modules = [], {}
    for index in layers:
        handles.append(
            stack[index].register_forward_hook(lambda _, __, out, i=index: seen.layers.update({i: _first(out)}))
        )
    if attention:
        modules = {module: (seen, index) for index in attention for module in stack[index].modules()}
        handles.append(stack[min(attention)].register_forward_pre_hook(_below(seen), with_kwargs=True))
    _WATCHERS.update(modules)
    try:
        yield seen
    finally:
        for module in modules:
            _WATCHERS.pop(module, None)
        for handle in handles:
            handle.remove()


_WATCHERS = {}


def _below(seen):
    def hook(_, args, kwargs):
        seen.below = args[0] if args else kwargs["hidden_states"]

    return hook


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _watched_sdpa(module, query, key, value, attention_mask, scaling=None, **rest):
    if module in _WATCHERS:
        seen, index = _WATCHERS[module]
        seen.attention[index] = query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **rest)


transformers.AttentionInterface.register(WATCHED_SDPA, _watched_sdpa)
# without a mask function of the same name the model would run without any mask, padding included
transformers.AttentionMaskInterface.register(WATCHED_SDPA, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
