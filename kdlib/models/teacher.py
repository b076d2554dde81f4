"""The teacher: frozen, on its own device, reading its own ids of the text."""

import torch

from kdlib.losses import divergences
from kdlib.losses.teacher_signal import TeacherSignal, TopKLogProbs
from kdlib.models import loading


class Teacher:
    """A live teacher. Not an `nn.Module`: nothing that sets a whole model to training, moves or averages it gets here.

    `teacher(batch)` gives the `TeacherSignal` on the batch's device; `taps` (`loading.Taps`), `spans`, `shortlist`
    (`TopKSpec`) and `inner` ask for more of it. `head` decodes where the model is, `student_side_head` where the student is.
    """

    def __init__(self, model, reader):
        self.model = model.eval().requires_grad_(False)
        self.reader = reader
        self.head = self.student_side_head = loading.Head(model, reader.vocabulary)
        self.config = model.config
        self.known = None
        self.num_columns = self.head.num_rows
        """Logits of its own that a row is compared with."""

    def __call__(self, batch, taps=loading.Taps(), spans=False, shortlist=None, inner=False):  # noqa: B008 - frozen
        away = batch.student_ids.device
        # copies made outside: a tensor born in inference mode can't be saved for a backward pass
        return self.read(batch, taps, spans, shortlist, inner).copied(lambda tensor: tensor.clone().to(away))

    def read(self, batch, taps, spans, shortlist=None, inner=False):
        """The signal where the teacher is, of tensors that only a copy makes fit for a backward pass."""
        moved = batch.to(self.model.device)
        with torch.inference_mode():
            found = loading.read(
                self.model, moved.teacher_ids, moved.teacher_windows, moved.teacher_rows, batch.rows_by_window, taps,
                batch.teacher_positions,
            )  # fmt: skip
            last = found.last.flatten(0, 1)
            told, top = self._decoded(last, moved, spans, shortlist) if spans or shortlist else (None, None)
            more = last[moved.inner_rows] if inner else None
            return TeacherSignal(last[moved.teacher_rows], told, top, found.layers, found.maps, found.vectors, more)

    def states(self, batch):
        """Last hidden states of all teacher tokens of a batch, `[B * L, Dt]`, where the teacher is."""
        moved = batch.to(self.model.device)
        with torch.inference_mode():
            states = loading.last_hidden(self.model, moved.teacher_ids, moved.teacher_windows, batch.teacher_packed)
            return states.flatten(0, 1)

    def of(self, split):
        """The teacher of one split of the text: a live one reads all."""
        return self

    def shared_rows(self, shared):
        """Its head's rows for the tokens of a `vocab.SharedVocabulary`, `[S, Dt]`."""
        return self.head.rows(torch.from_numpy(shared.teacher_ids))

    def _decoded(self, last, batch, spans, shortlist, chunk_size=256):
        """`(spans, top)`: log-likelihood of each aligned position's span by the teacher's own tokens, and its `TopKLogProbs`.
        Every row is decoded once.
        """
        lengths = batch.teacher_span_ends - batch.teacher_rows if spans else torch.zeros_like(batch.teacher_rows)
        span_of = torch.repeat_interleave(torch.arange(len(lengths), device=last.device), lengths)
        firsts = lengths.cumsum(0) - lengths
        inside = batch.teacher_rows[span_of] + torch.arange(len(span_of), device=last.device) - firsts[span_of]
        asked = batch.teacher_rows if shortlist else batch.teacher_rows[:0]
        rows = torch.cat([inside, asked]).unique()
        is_asked = torch.isin(rows, asked)
        labels = self.head.columns(batch.teacher_labels.flatten()[rows])
        nats, tops = [last.new_zeros(0).float()], []
        for part, label, wanted in zip(*(every.split(chunk_size) for every in (rows, labels, is_asked)), strict=True):
            log_probs = divergences.log_softmax(self.head.decode(last[part]))
            nats.append(divergences.cross_entropy(log_probs, label))
            if shortlist and wanted.any():
                tops.append(shortlist.of(log_probs[wanted]))
        told = divergences.span_log_probs(torch.cat(nats)[torch.searchsorted(rows, inside)], span_of, len(lengths))
        if not shortlist or not tops:
            return told, shortlist and shortlist.of(last.new_zeros(0, self.head.num_rows))
        return told, TopKLogProbs.cat(tops).rows(torch.searchsorted(rows[is_asked], asked))
