"""Forward passes: last hidden states, alone or packed into rows, and features of tapped layers."""

import dataclasses
import re

import torch

from kdlib import memory
from kdlib.environment import first_line
from kdlib.losses import features
from kdlib.models import hooks

PACKING_PROBE, PADDING_PROBE = 48, 8
"""Tokens per window in the tests whether a model supports packing, and padding. Short tests are faster."""
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, "quantised": 0.2}
"""Maximum change of hidden states by packing or padding, relative to their norm; 1e-4 for other types. In 8 bits, the
rounding of a row depends on other rows.
"""


def last_hidden(model, ids, windows, packed=False):
    """Returns the hidden states `[B, L, D]` after the final norm. `windows` `[B, L]` is 0 for padding. In `packed` rows
    it numbers the window of each position, and windows do not attend to each other.
    """
    inputs = {"attention_mask": (windows > 0).long()}
    if packed:
        inputs = {
            "attention_mask": features.block_diagonal(windows),
            "position_ids": features.restart_positions(windows),
        }
    backbone = model.base_model if model.base_model is not model else model.model  # the prefix of Llama 4 names none
    return backbone(input_ids=ids, use_cache=False, **inputs).last_hidden_state


@torch.no_grad()
def check_padding(model, length):
    """Raises ValueError unless a window of `length` tokens has the same hidden states in a padded batch as alone."""
    ids = _probe_ids(model, length, PADDING_PROBE)
    windows = torch.ones_like(ids)
    windows[1, ids.shape[1] // 2 + 1 :] = 0
    num_tokens = int(windows[1].sum())
    name = type(model).__name__
    try:
        batched = last_hidden(model, ids, windows)[1, :num_tokens]
        alone = last_hidden(model, ids[1:, :num_tokens], windows[1:, :num_tokens])[0]
    except Exception as error:
        if memory.is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{name} cannot be run on windows of {ids.shape[1]} tokens: {reason}") from None
    if not _same(batched, alone, "quantised" if getattr(model, "is_quantized", False) else model.dtype):
        raise ValueError(f"{name} gives other hidden states for a window in a padded batch than alone; not supported")


def _probe_ids(model, length, short):
    """Returns the ids of two windows, `[2, length]`; of `short` tokens at most unless the model depends on the length."""
    length = max(2, length if _depends_on_length(model.config) else min(length, short))
    rows = model.config.get_text_config().vocab_size
    return torch.randint(rows, (2, length), generator=torch.Generator().manual_seed(0)).to(model.device)


def _same(hidden, expected, dtype):
    """Returns whether hidden states `[..., D]` are equal up to rounding."""
    change = (hidden.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    return bool((change < TOLERANCE.get(dtype, 1e-4)).all())


@torch.no_grad()
def packs(model, length):
    """Returns whether windows of `length` tokens give the same hidden states packed into one row as alone, tested on two.

    Not so with a recurrent state, local attention, own position counts, or without support for our masks.
    """
    ids = _probe_ids(model, length, PACKING_PROBE)
    windows = torch.arange(1, 3, device=model.device)[:, None].expand_as(ids)
    alone = last_hidden(model, ids, windows)
    try:
        packed = last_hidden(model, ids.reshape(1, -1), windows.reshape(1, -1), packed=True)
    except Exception:  # noqa: BLE001 - models without support for such masks raise various errors
        return False
    return _same(packed.view_as(alone), alone, model.dtype)


def _depends_on_length(config):
    """Returns whether a configuration has local attention, or a position encoding that depends on the length."""
    settings = config.get_text_config().to_dict()
    sizes = [
        name for name, value in settings.items() if isinstance(value, int) and not isinstance(value, bool) and value
    ]
    if any(re.search("window|chunk|local|block", name) and not name.endswith("layers") for name in sizes):
        return True
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    return re.search("dynamic|longrope", str(rope)) is not None


@dataclasses.dataclass(frozen=True)
class Taps:
    """What to read in a forward pass: outputs of layers, span maps and vectors of attention layers (ascending)."""

    layers: tuple = ()
    maps: tuple = ()
    vectors: tuple = ()


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of a forward pass at N common boundaries. Tuples have one entry per tapped layer.

    `last` `[B, L, D]`: hidden states after the final norm. `layers`: outputs `[N, D]`. `maps`: lists of the B windows'
    span maps `[K, K]` (`features.span_map`). `vectors`: `(q, k, v)` after position encoding, `[N, W]` each, heads
    concatenated. `attention_input` `[B, L, D]`: the input of the lowest tapped attention layer.
    """

    last: torch.Tensor
    layers: tuple = ()
    maps: tuple = ()
    vectors: tuple = ()
    attention_input: torch.Tensor | None = None


def read(model, ids, windows, rows, rows_by_window, taps, row_slices=None):
    """Returns the `Features` of a forward pass at the flat positions `rows` `[N]`. `rows_by_window` counts them by window;
    `windows` is as for `last_hidden`, `row_slices` as in `batching.Batch` (None: one row per window).
    """
    row_slices = row_slices or [(row, 0, ids.shape[1]) for row in range(len(ids))]
    with hooks.watch(model, taps.layers, sorted({*taps.maps, *taps.vectors})) as watched:
        last = last_hidden(model, ids, windows, packed=len(row_slices) > len(ids))
    missing = sorted({*taps.maps, *taps.vectors} - watched.attention.keys())
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no attention to read in its layers {', '.join(map(str, missing))}; set "
            "attention_weight and attention_alignment_weight to 0"
        )
    layers = tuple(watched.layers[i].flatten(0, 1)[rows] for i in taps.layers)
    maps = tuple(_span_maps(*watched.attention[i], rows.split(rows_by_window), row_slices) for i in taps.maps)
    vectors = tuple(
        tuple(part.transpose(1, 2).flatten(2).flatten(0, 1)[rows] for part in watched.attention[i][:3])
        for i in taps.vectors
    )
    return Features(last, layers, maps, vectors, watched.attention_input)


def _span_maps(query, key, _, scaling, rows_of_windows, row_slices):
    length, maps = query.shape[2], []
    with torch.autocast(query.device.type, enabled=False):
        for rows, (row, start, stop) in zip(rows_of_windows, row_slices, strict=True):
            ends = rows - (row * length + start)
            maps.append(features.span_map(query[row][:, start + ends], key[row, :, start:stop], ends, scaling))
    return maps
