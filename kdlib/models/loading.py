"""Loading models and tokenizers, the output head that every loss decodes through, and what is read off a forward pass."""

import copy
import dataclasses
import re

import torch
import torch.nn.functional as F
import transformers

from kdlib.align import vocab
from kdlib.data import tokenize
from kdlib.losses import features
from kdlib.models import devices, hooks

PROBE_TOLERANCE = 1e-2
PACKING_PROBE = 48
"""Tokens of each of the windows by which it is found out whether windows may share a row."""
SHARED_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far hidden states may be moved by another layout of the rows, as a share of their norm; 1e-4 in other types."""
QUANTISED_TOLERANCE = 0.1
"""Of the largest logit: in 8 bits a row's rounding depends a little on other rows, where outliers are looked for too."""


def load_tokenizer(source, role):
    """The fast tokenizer of a Hugging Face id or folder; ValueError says what is missing. `role` names it in errors."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:  # noqa: BLE001 - whatever the loader raises is the user's folder or id
        raise ValueError(f"{role} {source!r} has no tokenizer that loads: {_first_line(error)}") from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):  # transformers 5.0 makes one up where none is
        raise ValueError(f"{role} {source!r} has no tokenizer that loads: all it knows are special tokens")
    return tokenizer


def load_config(source, role):
    """The configuration of a Hugging Face id or folder; ValueError where it does not load."""
    try:
        return transformers.AutoConfig.from_pretrained(source)
    except Exception as error:  # noqa: BLE001
        raise ValueError(f"{role} {str(source)!r} is no model that loads: {_first_line(error)}") from None


def load_model(source, role, dtype=torch.float32, device="cpu", quantization="none"):
    """A causal language model in evaluation mode, on `device`; with a `quantization` (`8bit`, `4bit`) its layers' weights
    are quantised by bitsandbytes. Raises ValueError for anything else: a folder that does not load, an encoder, a model that
    sees the future, or one whose logits are not its output head times its last hidden state.
    """
    config = load_config(source, role)
    names = getattr(config, "architectures", None) or []
    causal = [name for name in names if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if config.is_encoder_decoder or (names and not causal):
        raise ValueError(
            f"{role} {source!r} is a {', '.join(names) or config.model_type}; expected a causal language model"
        )
    told = _quantised(quantization, dtype, device)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **told)
    except Exception as error:  # noqa: BLE001
        raise ValueError(f"{role} {source!r} does not load as a causal language model: {_first_line(error)}") from None
    model.eval()
    _probe(model, f"{role} {source!r}")
    return model if told else model.to(device)  # quantised, it is there already and can't be moved


def _quantised(quantization, dtype, device):
    """What `from_pretrained` is told for quantised weights. The output head stays as it is, tied or not."""
    if quantization == "none":
        return {}
    devices.bitsandbytes("teacher_quantization", quantization, "none")
    known = {
        "8bit": {"load_in_8bit": True},
        "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
    }[quantization]
    return {"quantization_config": transformers.BitsAndBytesConfig(**known), "device_map": {"": str(device)}}


def load_reader(source, role, model_config=None):
    """The `tokenize.TextTokenizer` of a model's own tokenizer. ValueError where the model has no row for one of its tokens."""
    tokenizer = load_tokenizer(source, role)
    vocabulary = vocab.read_vocabulary(tokenizer)
    rows = getattr(model_config, "vocab_size", None)
    if rows is not None and vocabulary.num_rows > rows:
        raise ValueError(
            f"{role} {source!r}: its tokenizer has ids up to {vocabulary.num_rows - 1}, its model only {rows} rows; "
            "the tokenizer belongs to another model"
        )
    return tokenize.wrap_tokenizer(tokenizer, vocabulary, getattr(model_config, "max_position_embeddings", 0) or 0)


class Head:
    """The output head of a live model, restricted to the rows that have a token.

    Reads the model's own weight each time, so it never goes stale, tied or not. Columns of its logits are token ids,
    but for a vocabulary with gaps: there `columns(ids)` translates.
    """

    def __init__(self, model, vocabulary):
        self.module = model.get_output_embeddings()
        self.vocabulary = vocabulary
        self.num_rows = vocabulary.num_rows
        self.kept = None
        if vocabulary.gaps:
            keep = torch.ones(self.num_rows, dtype=torch.bool)
            keep[list(vocabulary.gaps)] = False
            self.kept = keep.nonzero().squeeze(1)
            self._column = keep.cumsum(0) - 1

    @property
    def weight(self):
        """`[V, D]`, rows with a token first to last; a view of the live weight where the vocabulary has no gaps."""
        weight = self.module.weight
        if len(weight) > self.num_rows:
            weight = weight[: self.num_rows]
        return weight if self.kept is None else weight[self.kept.to(weight.device)]

    @property
    def bias(self):
        bias = getattr(self.module, "bias", None)
        if bias is None:
            return None
        bias = bias[: self.num_rows]
        return bias if self.kept is None else bias[self.kept.to(bias.device)]

    @property
    def width(self):
        return self.module.weight.shape[1]

    def on(self, device):
        """This head, of a model that never changes, on another device: a copy of its weight."""
        made = copy.copy(self)
        made.module = copy.deepcopy(self.module).to(device)
        return made

    def rows(self, ids):
        """The head's rows of some token ids, `[len(ids), D]`, without gradient."""
        return self.module.weight.detach()[ids.to(self.module.weight.device)]

    def decode(self, hidden_ND):
        """Logits `[N, V]` of last hidden states."""
        return F.linear(hidden_ND, self.weight, self.bias)

    def decoder(self):
        """A `decode` without gradient that writes every result to the same place: one is good until the next is made.
        Spares a processor's allocator, which keeps what it gave once; a card's knows how to reuse it.
        """
        rooms = {}

        @torch.no_grad()
        def decode(hidden_ND):
            if hidden_ND.device.type != "cpu" or hidden_ND.dtype != torch.float32 or not len(hidden_ND):
                return self.decode(hidden_ND)
            weight = self.weight
            if len(rooms.get("logits", ())) < len(hidden_ND):
                rooms["logits"] = hidden_ND.new_empty(len(hidden_ND), len(weight))
            logits = torch.mm(hidden_ND, weight.T, out=rooms["logits"][: len(hidden_ND)])
            return logits if self.bias is None else logits.add_(self.bias)

        return decode

    def columns(self, ids):
        """Columns of the logits for token ids (a LongTensor; -100 stays)."""
        if self.kept is None:
            return ids
        return torch.where(ids < 0, ids, self._column.to(ids.device)[ids.clamp_min(0)])

    def by_column(self, values):
        """One value a token id (a numpy array) as one value a column of the logits (a tensor)."""
        values = torch.from_numpy(values)
        return values if self.kept is None else values[self.kept]


def last_hidden(model, ids, windows, packed=False):
    """Hidden states `[B, L, D]` after the final norm, without decoding them. `windows` `[B, L]` is 0 for padding; where rows
    are `packed` with several windows it says which one each position belongs to, and none sees another.
    """
    more = {"attention_mask": (windows > 0).long()}
    if packed:
        more = {"attention_mask": features.block_diagonal(windows), "position_ids": features.restart_positions(windows)}
    return model.base_model(input_ids=ids, use_cache=False, **more).last_hidden_state


@torch.no_grad()
def packs(model, length):
    """Whether windows of `length` tokens that share a row come out as each does alone: found out by two of them. They do not
    in models that keep a state from token to token, see a part of the row only, count positions by themselves, or take
    no mask of ours. Shorter windows tell the same unless something in the model's configuration depends on the length.
    """
    length = length if _depends_on_length(model.config) else min(length, PACKING_PROBE)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    places = torch.arange(1, 3, device=model.device)[:, None].expand_as(ids)
    alone = last_hidden(model, ids, places).double()
    try:
        shared = last_hidden(model, ids.reshape(1, -1), places.reshape(1, -1), packed=True).double()
    except Exception:  # noqa: BLE001 - a model that takes no such mask or positions says so in its own way
        return False
    moved = (shared.view_as(alone) - alone).norm(dim=-1) / alone.norm(dim=-1)
    return bool((moved < SHARED_TOLERANCE.get(model.dtype, 1e-4)).all())


def _depends_on_length(config):
    """Whether a configuration names a window, a chunk or the like, or a position encoding that changes in long rows."""
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
    """What to read off a forward pass besides its end: outputs of `layers`, span maps and vectors of attentions (layers
    counted from 0, ascending).
    """

    layers: tuple = ()
    maps: tuple = ()
    vectors: tuple = ()


@dataclasses.dataclass(frozen=True)
class Features:
    """What was read, at N common boundaries; a tuple has one entry a tapped layer.

    `last` `[B, L, D]`: hidden states after the final norm; `layers`: outputs `[N, D]`; `maps`: lists of the B windows' span
    maps `[K, K]` (`features.span_map`); `vectors`: `(q, k, v)` after position encoding, `[N, W]` each, heads side by
    side; `below`: the states `[B, L, D]` that the lowest tapped attention's layer was given.
    """

    last: torch.Tensor
    layers: tuple = ()
    maps: tuple = ()
    vectors: tuple = ()
    below: torch.Tensor | None = None


def read(model, ids, windows, rows, rows_by_window, taps, spots=None):
    """The `Features` of a forward pass at the flat positions `rows` `[N]`, `rows_by_window` of them in each window.
    `windows` as for `last_hidden`; `spots` as in `batching.Batch` (None: each window has a row).
    """
    spots = spots or [(row, 0, ids.shape[1]) for row in range(len(ids))]
    with hooks.watch(model, taps.layers, sorted({*taps.maps, *taps.vectors})) as seen:
        last = last_hidden(model, ids, windows, packed=len(spots) > len(ids))
    layers = tuple(seen.layers[i].flatten(0, 1)[rows] for i in taps.layers)
    maps = tuple(_span_maps(*seen.attention[i], rows.split(rows_by_window), spots) for i in taps.maps)
    vectors = tuple(
        tuple(part.transpose(1, 2).flatten(2).flatten(0, 1)[rows] for part in seen.attention[i][:3])
        for i in taps.vectors
    )
    return Features(last, layers, maps, vectors, seen.below)


def _span_maps(query, key, _, scaling, rows_of_windows, spots):
    length, maps = query.shape[2], []
    with torch.autocast(query.device.type, enabled=False):
        for rows, (row, start, stop) in zip(rows_of_windows, spots, strict=True):
            ends = rows - (row * length + start)
            maps.append(features.span_map(query[row][:, start + ends], key[row, :, start:stop], ends, scaling))
    return maps


@torch.no_grad()
def _probe(model, name):
    """Refuse a model that sees the future, or whose logits are scaled or capped after the head."""
    ids = torch.tensor([[1, 2, 3, 4]], device=model.device) % model.config.vocab_size
    changed = ids.clone()
    changed[0, -1] = 0
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask).logits[0].float()
    later = model(input_ids=changed, attention_mask=mask).logits[0].float()
    quantised = getattr(model, "is_quantized", False)
    tolerance = QUANTISED_TOLERANCE * float(logits.abs().max()) if quantised else PROBE_TOLERANCE
    if not torch.allclose(logits[:3], later[:3], atol=tolerance):
        raise ValueError(f"{name} sees tokens that come later: it is no causal language model")
    head = model.get_output_embeddings()
    if head is not None and not head.weight.is_floating_point():
        raise ValueError(f"{name}: its output head is quantised; take the whole model and set teacher_quantization")
    hidden = last_hidden(model, ids, mask)[0] if head is not None else None
    if head is None or not torch.allclose(head(hidden).float(), logits, atol=PROBE_TOLERANCE):
        raise ValueError(f"{name}: its logits are not its output head times its last hidden state; not supported")


def _first_line(error):
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def cpu_state_dict(model):
    """A module's weights and buffers on the CPU, as they are now, tied ones once: `{name: tensor}`."""
    seen, kept = set(), {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() == 0 or place not in seen:
            seen.add(place)
            kept[name] = tensor.detach().to("cpu", copy=True)
    return kept


@torch.no_grad()
def load_cpu_state_dict(model, weights):
    """Set a module to what `cpu_state_dict` gave; ValueError where they do not fit together."""
    own = model.state_dict()
    missing = {name for name in own.keys() - weights.keys() if own[name].data_ptr() not in
               {own[other].data_ptr() for other in weights if other in own}}  # fmt: skip
    odd = sorted(missing | (weights.keys() - own.keys()))
    odd += [name for name in weights.keys() & own.keys() if weights[name].shape != own[name].shape]
    if odd:
        raise ValueError(f"these weights are another model's: {', '.join(odd[:3])} do not fit")
    for name, tensor in weights.items():
        own[name].copy_(tensor)
