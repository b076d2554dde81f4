"""Loads models and tokenizers. The output head that every loss decodes through, and the features of a forward pass."""

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
"""Tokens per window in the test whether a model supports packing."""
PACKING_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Maximum change of hidden states by packing, relative to their norm; 1e-4 for other types."""
QUANTISED_TOLERANCE = 0.1
"""Relative to the largest logit: in 8 bits, outlier detection makes a row's rounding depend slightly on other rows."""


def load_tokenizer(source, role):
    """Loads the fast tokenizer of a Hugging Face id or folder. Raises ValueError, which names the `role`, on failure."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:  # noqa: BLE001 - any error of the loader is one of the id or folder
        raise ValueError(f"{role} {source!r}: cannot load its tokenizer: {_first_line(error)}") from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):  # transformers 5.0 invents one if there is none
        raise ValueError(f"{role} {source!r}: cannot load its tokenizer: it has special tokens only")
    return tokenizer


def load_config(source, role):
    """Loads the configuration of a Hugging Face id or folder. Raises ValueError if it cannot be loaded."""
    try:
        return transformers.AutoConfig.from_pretrained(source)
    except Exception as error:  # noqa: BLE001
        raise ValueError(f"{role} {str(source)!r}: cannot load its configuration: {_first_line(error)}") from None


def load_model(source, role, dtype=torch.float32, device="cpu", quantization="none"):
    """Loads a causal language model in evaluation mode on `device`, quantised if `quantization` is `8bit` or `4bit`.

    Raises ValueError if it fails to load, is not causal, or if its logits are not its head times its last hidden state.
    """
    config = load_config(source, role)
    names = getattr(config, "architectures", None) or []
    causal = [name for name in names if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if config.is_encoder_decoder or (names and not causal):
        raise ValueError(
            f"{role} {source!r} is a {', '.join(names) or config.model_type}; expected a causal language model"
        )
    options = _quantization_options(quantization, dtype, device)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except Exception as error:  # noqa: BLE001
        raise ValueError(
            f"{role} {source!r}: cannot load it as a causal language model: {_first_line(error)}"
        ) from None
    model.eval()
    _probe(model, f"{role} {source!r}")
    return model if options else model.to(device)  # a quantised model is there already and cannot be moved


def _quantization_options(quantization, dtype, device):
    """Returns the arguments of `from_pretrained` for quantised weights. The output head is not quantised, tied or not."""
    if quantization == "none":
        return {}
    devices.bitsandbytes("teacher_quantization", quantization, "none")
    options = {
        "8bit": {"load_in_8bit": True},
        "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
    }[quantization]
    return {"quantization_config": transformers.BitsAndBytesConfig(**options), "device_map": {"": str(device)}}


def load_reader(source, role, model_config=None):
    """Loads a model's `tokenize.TextTokenizer`. Raises ValueError if the model has no row for one of its tokens."""
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
    """The output head of a live model, restricted to rows that have a token. It reads the model's own weight at every
    use.

    Columns of its logits are token ids, except for vocabularies with gaps: `columns(ids)` translates.
    """

    def __init__(self, model, vocabulary):
        self.module = model.get_output_embeddings()
        self.vocabulary = vocabulary
        self.num_rows = vocabulary.num_rows
        self._row_ids = None
        if vocabulary.gaps:
            has_token = torch.ones(self.num_rows, dtype=torch.bool)
            has_token[list(vocabulary.gaps)] = False
            self._row_ids = has_token.nonzero().squeeze(1)
            self._column_of = has_token.cumsum(0) - 1

    @property
    def weight(self):
        """Rows with a token, `[V, D]`: a view of the live weight if the vocabulary has no gaps."""
        weight = self.module.weight
        if len(weight) > self.num_rows:
            weight = weight[: self.num_rows]
        return weight if self._row_ids is None else weight[self._row_ids.to(weight.device)]

    @property
    def bias(self):
        bias = getattr(self.module, "bias", None)
        if bias is None:
            return None
        bias = bias[: self.num_rows]
        return bias if self._row_ids is None else bias[self._row_ids.to(bias.device)]

    @property
    def width(self):
        return self.module.weight.shape[1]

    def on(self, device):
        """Returns a copy of this head on another device, for a model that never changes."""
        head = copy.copy(self)
        head.module = copy.deepcopy(self.module).to(device)
        return head

    def rows(self, ids):
        """Returns the head's rows of token ids, `[len(ids), D]`, without gradient."""
        return self.module.weight.detach()[ids.to(self.module.weight.device)]

    def decode(self, hidden_ND):
        """Returns the logits `[N, V]` of last hidden states."""
        return F.linear(hidden_ND, self.weight, self.bias)

    def decoder(self):
        """Returns a `decode` without gradient. On a CPU its result is valid until the next call: one buffer is reused."""
        buffers = {}

        @torch.no_grad()
        def decode(hidden_ND):
            if hidden_ND.device.type != "cpu" or hidden_ND.dtype != torch.float32 or not len(hidden_ND):
                return self.decode(hidden_ND)
            weight = self.weight
            if len(buffers.get("logits", ())) < len(hidden_ND):
                buffers["logits"] = hidden_ND.new_empty(len(hidden_ND), len(weight))
            logits = torch.mm(hidden_ND, weight.T, out=buffers["logits"][: len(hidden_ND)])
            return logits if self.bias is None else logits.add_(self.bias)

        return decode

    def columns(self, ids):
        """Returns the columns of the logits for token ids (a LongTensor; -100 is kept)."""
        if self._row_ids is None:
            return ids
        return torch.where(ids < 0, ids, self._column_of.to(ids.device)[ids.clamp_min(0)])

    def by_column(self, values):
        """Converts one value per token id (an array) to one value per column of the logits (a tensor)."""
        values = torch.from_numpy(values)
        return values if self._row_ids is None else values[self._row_ids]


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
    return model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state


@torch.no_grad()
def packs(model, length):
    """Returns whether windows of `length` tokens give the same hidden states packed into one row as alone, tested on two.

    Not so with a recurrent state, local attention, own position counts, or without support for our masks.
    """
    length = length if _depends_on_length(model.config) else min(length, PACKING_PROBE)  # short tests are faster
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    windows = torch.arange(1, 3, device=model.device)[:, None].expand_as(ids)
    alone = last_hidden(model, ids, windows).double()
    try:
        packed = last_hidden(model, ids.reshape(1, -1), windows.reshape(1, -1), packed=True).double()
    except Exception:  # noqa: BLE001 - models without support for such masks raise various errors
        return False
    change = (packed.view_as(alone) - alone).norm(dim=-1) / alone.norm(dim=-1)
    return bool((change < PACKING_TOLERANCE.get(model.dtype, 1e-4)).all())


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


@torch.no_grad()
def _probe(model, name):
    """Raises ValueError if a model is not causal, or if its logits are scaled or capped after the head."""
    ids = torch.tensor([[1, 2, 3, 4]], device=model.device) % model.config.vocab_size
    changed = ids.clone()
    changed[0, -1] = 0
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask).logits[0].float()
    later = model(input_ids=changed, attention_mask=mask).logits[0].float()
    quantised = getattr(model, "is_quantized", False)
    tolerance = QUANTISED_TOLERANCE * float(logits.abs().max()) if quantised else PROBE_TOLERANCE
    if not torch.allclose(logits[:3], later[:3], atol=tolerance):
        raise ValueError(f"{name} attends to later tokens: it is not a causal language model")
    head = model.get_output_embeddings()
    if head is not None and not head.weight.is_floating_point():
        raise ValueError(f"{name}: its output head is quantised; use the original model and set teacher_quantization")
    hidden = last_hidden(model, ids, mask)[0] if head is not None else None
    if head is None or not torch.allclose(head(hidden).float(), logits, atol=PROBE_TOLERANCE):
        raise ValueError(f"{name}: its logits are not its output head times its last hidden state; not supported")


def _first_line(error):
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def cpu_state_dict(model):
    """Returns copies of a module's weights and buffers on the CPU, tied ones once: `{name: tensor}`."""
    seen, state = set(), {}
    for name, tensor in model.state_dict().items():
        storage = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() == 0 or storage not in seen:
            seen.add(storage)
            state[name] = tensor.detach().to("cpu", copy=True)
    return state


@torch.no_grad()
def load_cpu_state_dict(model, weights):
    """Loads the result of `cpu_state_dict` into a module. Raises ValueError if names or shapes do not fit."""
    own = model.state_dict()
    missing = {name for name in own.keys() - weights.keys() if own[name].data_ptr() not in
               {own[other].data_ptr() for other in weights if other in own}}  # fmt: skip
    misfits = sorted(missing | (weights.keys() - own.keys()))
    misfits += [name for name in weights.keys() & own.keys() if weights[name].shape != own[name].shape]
    if misfits:
        raise ValueError(f"these weights belong to another model: {', '.join(misfits[:3])} do not fit")
    for name, tensor in weights.items():
        own[name].copy_(tensor)
