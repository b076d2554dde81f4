"""The live teacher: frozen, on its own device, with its own token ids."""

import torch

from kdlib.losses import divergences
from kdlib.losses.teacher_signal import TeacherSignal, TopKLogProbs
from kdlib.models import forward
from kdlib.models.head import Head


class Teacher:
    """A live teacher. Not an `nn.Module`, so that nothing trains, moves or averages it together with the student.

    `teacher(batch)` returns the `TeacherSignal` on the batch's device. `taps` (`forward.Taps`), `spans`, `shortlist`
    (`TopKSpec`) and `inner` add to it. `head` is on the model's device, `student_side_head` on the student's.
    `num_columns` is the number of logits per row. Only a cache has a `score`.
    """

    def __init__(self, model, reader):
        self.model = model.eval().requires_grad_(False)
        self.reader = reader
        self.head = self.student_side_head = Head(model, reader.vocabulary)
        self.config = model.config.get_text_config()
        self.score = None
        self.num_columns = self.head.num_rows

    def __call__(self, batch, taps=forward.Taps(), spans=False, shortlist=None, inner=False):  # noqa: B008 - frozen
        device = batch.student_ids.device
        # cloned outside: autograd cannot save a tensor that was created in inference mode
        return self.read(batch, taps, spans, shortlist, inner).map_tensors(lambda tensor: tensor.clone().to(device))

    def read(self, batch, taps, spans, shortlist=None, inner=False):
        """Returns the signal on the teacher's device. Its tensors must be copied before a backward pass uses them."""
        batch = batch.to(self.model.device)
        with torch.inference_mode():
            features = forward.read(
                self.model, batch.teacher_ids, batch.teacher_windows, batch.teacher_rows, batch.rows_by_window, taps,
                batch.teacher_row_slices,
            )  # fmt: skip
            last = features.last.flatten(0, 1)
            decoded = self._decode(last, batch, spans, shortlist) if spans or shortlist else (None, None)
            partial_hidden = last[batch.inner_rows] if inner else None
            layers, maps, vectors = features.layers, features.maps, features.vectors
            return TeacherSignal(last[batch.teacher_rows], *decoded, layers, maps, vectors, partial_hidden)

    def states(self, batch):
        """Returns the last hidden states of all teacher tokens of a batch, `[B * L, Dt]`, on the teacher's device."""
        batch = batch.to(self.model.device)
        with torch.inference_mode():
            states = forward.last_hidden(self.model, batch.teacher_ids, batch.teacher_windows, batch.teacher_packed)
            return states.flatten(0, 1)

    def for_split(self, split):
        """Returns the teacher of one split of the text: a live one reads all splits."""
        return self

    def shared_rows(self, shared):
        """Returns the head's rows for the tokens of a `vocab.SharedVocabulary`, `[S, Dt]`."""
        return self.head.rows(torch.from_numpy(shared.teacher_ids))

    def _decode(self, last, batch, spans, shortlist, chunk_size=256):
        """Returns `(log-likelihood of the span at each aligned position, TopKLogProbs there)`. Decodes every row once."""
        lengths = batch.teacher_span_ends - batch.teacher_rows if spans else torch.zeros_like(batch.teacher_rows)
        span_of = torch.repeat_interleave(torch.arange(len(lengths), device=last.device), lengths)
        starts = lengths.cumsum(0) - lengths
        span_rows = batch.teacher_rows[span_of] + torch.arange(len(span_of), device=last.device) - starts[span_of]
        topk_rows = batch.teacher_rows if shortlist else batch.teacher_rows[:0]
        rows = torch.cat([span_rows, topk_rows]).unique()
        needs_topk = torch.isin(rows, topk_rows)
        labels = self.head.columns(batch.teacher_labels.flatten()[rows])
        nats, topks = [last.new_zeros(0).float()], []
        chunks = (tensor.split(chunk_size) for tensor in (rows, labels, needs_topk))
        for chunk_rows, chunk_labels, mask in zip(*chunks, strict=True):
            log_probs = divergences.log_softmax(self.head.decode(last[chunk_rows]))
            nats.append(divergences.cross_entropy(log_probs, chunk_labels))
            if shortlist and mask.any():
                topks.append(shortlist.select(log_probs[mask]))
        nats = torch.cat(nats)[torch.searchsorted(rows, span_rows)]
        span_log_probs = divergences.span_log_probs(nats, span_of, len(lengths))
        if not shortlist or not topks:
            return span_log_probs, shortlist and shortlist.select(last.new_zeros(0, self.head.num_rows))
        return span_log_probs, TopKLogProbs.cat(topks).rows(torch.searchsorted(rows[needs_topk], topk_rows))
