"""The output head that every loss decodes through, and the scale and cap that some models apply to its logits."""

import copy
import dataclasses
import itertools

import torch
import torch.nn.functional as F

from kdlib.models import forward

TOLERANCE = 1e-2
"""Largest difference of logits to the model's own, or relative to the largest logit for models not in float32."""
QUANTISED_TOLERANCE = 0.1
"""Relative to the largest logit: in 8 bits, outlier detection makes a row's rounding depend slightly on other rows."""
SMALL, LARGE = 1e-2, 1e4
"""Magnitudes of the head's output that tell the scale of the logits, and their cap."""


@dataclasses.dataclass(frozen=True)
class LogitsTransform:
    """What a model does to its head's output `z`: `cap * tanh(scale * z / cap)`, or `scale * z` if `cap` is 0."""

    scale: float = 1.0
    cap: float = 0.0

    def __call__(self, logits):
        if self.cap:
            return torch.tanh(logits * (self.scale / self.cap)) * self.cap
        return logits if self.scale == 1.0 else logits * self.scale


def logits_transform(model):
    """Returns the `LogitsTransform` of a model, found at its first call and kept with the model.

    It is measured: the head's input is scaled so that its output is tiny, where only the scale matters, and huge, where
    only the cap does. A value of the configuration replaces a measured one that it agrees with. Raises ValueError if
    the model is not causal, or if its logits are not such a function of its output head times its last hidden state.
    """
    if not hasattr(model, "kdlib_logits_transform"):
        was_training = model.training
        model.eval()
        model.kdlib_logits_transform = _measure_transform(model)
        model.train(was_training)
    return model.kdlib_logits_transform


@torch.no_grad()
def _measure_transform(model):
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError("it has no output head that a loss could read")
    if not head.weight.is_floating_point():
        raise ValueError("its output head is quantised; use the original model and set teacher_quantization")
    ids = torch.tensor([[1, 2, 3, 4]], device=model.device) % model.config.get_text_config().vocab_size
    changed = ids.clone()
    changed[0, -1] = 0
    mask = torch.ones_like(ids)
    logits = _logits(model, ids, mask)
    tolerance = _tolerance(model, logits)
    if not torch.allclose(logits[:3], _logits(model, changed, mask)[:3], atol=tolerance):
        raise ValueError("it attends to later tokens: it is not a causal language model")
    hidden = forward.last_hidden(model, ids, mask)[0]
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError("its logits are not its output head times its last hidden state; not supported")
    largest = float(head(hidden).abs().max()) or 1.0
    found = []  # (the head's output, the model's logits) at tiny, natural and huge magnitude
    limit = torch.finfo(hidden.dtype).max / 8 / (float(hidden.abs().max()) or 1.0)  # float16 ends at 65,504
    for factor in (SMALL / largest, 1.0, min(LARGE / largest, limit)):
        handle = head.register_forward_pre_hook(lambda _, args, factor=factor: (args[0] * factor, *args[1:]))
        try:
            found.append((head.forward(hidden * factor).float(), _logits(model, ids, mask)))
        finally:
            handle.remove()
    for transform in _candidates(model, *found[0], *found[2]):
        if all(torch.allclose(transform(z), own, atol=_tolerance(model, own), rtol=TOLERANCE) for z, own in found):
            return transform
    raise ValueError("its logits are not a scaled or capped product of its output head and last hidden state")


def _candidates(model, small, small_logits, large, large_logits):
    """Returns possible `LogitsTransform`s, nearest to the measurements first. The cap may not be reached in float16, so all
    values of the configuration may be it.
    """
    settings = model.config.get_text_config().to_dict().values()
    values = [1.0, *(float(v) for v in settings if isinstance(v, int | float) and not isinstance(v, bool) and v)]
    scale = float((small * small_logits).sum() / (small * small).sum().clamp_min(1e-30))
    cap = float(large_logits.abs().max())
    scales = [s for v in values for s in (v, 1 / v) if abs(s - scale) <= TOLERANCE * abs(scale)]
    scales.sort(key=lambda value: abs(value - scale))
    caps = sorted(filter(lambda value: value > 0, values), key=lambda value: abs(value - cap))
    return [LogitsTransform(*pair) for pair in itertools.product((*scales, scale), (0.0, *caps, cap))]


def _logits(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()


def _tolerance(model, logits):
    largest = float(logits.abs().max())
    if getattr(model, "is_quantized", False):
        return QUANTISED_TOLERANCE * largest
    return TOLERANCE * min(1.0, largest) if model.dtype == torch.float32 else TOLERANCE * max(1.0, largest)


class Head:
    """The output head of a live model, restricted to rows that have a token. It reads the model's own weight at every
    use.

    Its logits are `transform` (`LogitsTransform`) of a matrix product. Columns of its logits are token ids, except for
    vocabularies with gaps: `columns(ids)` translates.
    """

    def __init__(self, model, vocabulary):
        self.module = model.get_output_embeddings()
        self.transform = logits_transform(model)
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
        return self.transform(F.linear(hidden_ND, self.weight, self.bias))

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
            return self.transform(logits if self.bias is None else logits.add_(self.bias))

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
