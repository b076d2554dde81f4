"""The teacher: frozen, on its own device, reading its own ids of the text."""

import dataclasses

import torch

from kdlib import losses, models


@dataclasses.dataclass(frozen=True)
class TopTokens:
    """The teacher's next token in short, at N positions: the K likeliest shared tokens and one tail for all else.

    `ids` `[N, K]`: student ids, the likeliest first; `log_probs` `[N, K + 1]`: of these and, last, of the tail; `best`
    `[N]`: the student id with the bytes of the single likeliest teacher token, -1 where there is none, or None.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    best: torch.Tensor | None = None

    def rows(self, part):
        """The same of some of the positions (a slice, or indices)."""
        return TopTokens(self.ids[part], self.log_probs[part], None if self.best is None else self.best[part])

    @classmethod
    def joined(cls, parts):
        """Several, one behind the other."""
        every = [[getattr(part, name) for part in parts] for name in ("ids", "log_probs", "best")]
        return cls(*(None if each[0] is None else torch.cat(each) for each in every))

    def to(self, device):
        return _copied(self, lambda tensor: tensor.to(device))

    def cut(self, k):
        """The same with the likeliest `k` tokens only; the others join the tail."""
        if k >= self.ids.shape[1]:
            return self
        tail = self.log_probs[:, k:].logsumexp(dim=-1, keepdim=True)
        return TopTokens(self.ids[:, :k], torch.cat([self.log_probs[:, :k], tail], dim=-1), self.best)


@dataclasses.dataclass(frozen=True)
class TeacherSignal:
    """What the losses need of the teacher at the batch's N aligned positions.

    `hidden` `[N, Dt]`: last hidden states (None where a cache holds none); `spans` `[N]`: log-likelihood of the text of the
    span that starts there, in nats, 0 where none does (None where nobody asked); `top`: `TopTokens`, where these are all
    that is known of the distribution; `layers`, `maps`, `vectors`: as in `models.Features`; `inner` `[M, Dt]`: last hidden
    states at `Batch.inner_rows` (None where nobody asked); `said`: from a cache, what the teacher said inside tokens, as
    `spelled.Walk.shortlists` gives it (None where nobody asked).
    """

    hidden: torch.Tensor | None
    spans: torch.Tensor | None = None
    top: TopTokens | None = None
    layers: tuple = ()
    maps: tuple = ()
    vectors: tuple = ()
    inner: torch.Tensor | None = None
    said: tuple | None = None

    def rows(self, part):
        """Hidden states, spans and top tokens of some of the positions (a slice, or indices)."""
        hidden, spans = (None if each is None else each[part] for each in (self.hidden, self.spans))
        return TeacherSignal(hidden, spans, self.top and self.top.rows(part))

    def copied(self, copy):
        """The signal of `copy(tensor)`s."""
        return _copied(self, copy)

    def to(self, device):
        """The same on a device."""
        return self.copied(lambda tensor: tensor.to(device))


@dataclasses.dataclass(frozen=True, eq=False)
class Shortlist:
    """How a `TopTokens` is made: the `k` likeliest of `num_buckets` buckets at a `temperature`, the last of them the tail.

    By column of the teacher's head, `bucket_of` `[Vt]` and `same` `[Vt]` (the student id with the same bytes, or -1);
    `student_ids` `[num_buckets - 1]`: the student id that stands for a bucket.
    """

    k: int
    temperature: float
    num_buckets: int
    bucket_of: torch.Tensor
    same: torch.Tensor
    student_ids: torch.Tensor

    def of(self, log_probs_NV):
        """The `TopTokens` of a teacher's log-probabilities `[N, Vt]`."""
        device = log_probs_NV.device
        told = losses.bucket_log_probs(log_probs_NV, self.bucket_of.to(device), self.num_buckets)
        if self.temperature != 1.0:
            told = losses.log_probs(told, self.temperature)
        likeliest = told[:, :-1].topk(min(self.k, self.num_buckets - 1), dim=-1).indices
        best = self.same.to(device)[log_probs_NV.argmax(dim=-1)]
        return TopTokens(self.student_ids.to(device)[likeliest], losses.kept_and_tail(told, likeliest), best)


class Teacher:
    """A live teacher. Not an `nn.Module`: nothing that sets a whole model to training, moves or averages it gets here.

    `teacher(batch)` gives the `TeacherSignal` on the batch's device; `taps` (`models.Taps`), `spans`, `shortlist`
    (`Shortlist`) and `inner` ask for more of it. `head` decodes where the model is, `near` where the student is.
    """

    def __init__(self, model, reader):
        self.model = model.eval().requires_grad_(False)
        self.reader = reader
        self.head = self.near = models.Head(model, reader.vocabulary)
        self.config = model.config
        self.known = None
        self.num_columns = self.head.num_rows
        """Logits of its own that a row is compared with."""

    def __call__(self, batch, taps=models.Taps(), spans=False, shortlist=None, inner=False):  # noqa: B008 - frozen
        away = batch.student_ids.device
        # copies made outside: a tensor born in inference mode can't be saved for a backward pass
        return self.read(batch, taps, spans, shortlist, inner).copied(lambda tensor: tensor.clone().to(away))

    def read(self, batch, taps, spans, shortlist=None, inner=False):
        """The signal where the teacher is, of tensors that only a copy makes fit for a backward pass."""
        moved = batch.to(self.model.device)
        with torch.inference_mode():
            found = models.read(
                self.model, moved.teacher_ids, moved.teacher_windows, moved.teacher_rows, batch.rows_by_window, taps,
                batch.teacher_spots,
            )  # fmt: skip
            last = found.last.flatten(0, 1)
            told, top = self._decoded(last, moved, spans, shortlist) if spans or shortlist else (None, None)
            more = last[moved.inner_rows] if inner else None
            return TeacherSignal(last[moved.teacher_rows], told, top, found.layers, found.maps, found.vectors, more)

    def states(self, batch):
        """Last hidden states of all teacher tokens of a batch, `[B * L, Dt]`, where the teacher is."""
        moved = batch.to(self.model.device)
        with torch.inference_mode():
            states = models.last_hidden(self.model, moved.teacher_ids, moved.teacher_windows, batch.teacher_packed)
            return states.flatten(0, 1)

    def of(self, split):
        """The teacher of one split of the text: a live one reads all."""
        return self

    def shared_rows(self, shared):
        """Its head's rows for the tokens of a `vocab.SharedVocabulary`, `[S, Dt]`."""
        return self.head.rows(torch.from_numpy(shared.teacher_ids))

    def _decoded(self, last, batch, spans, shortlist, chunk_size=256):
        """`(spans, top)`: log-likelihood of each aligned position's span by the teacher's own tokens, and its `TopTokens`.
        Every row is decoded once.
        """
        lengths = batch.teacher_stops - batch.teacher_rows if spans else torch.zeros_like(batch.teacher_rows)
        span_of = torch.repeat_interleave(torch.arange(len(lengths), device=last.device), lengths)
        firsts = lengths.cumsum(0) - lengths
        inside = batch.teacher_rows[span_of] + torch.arange(len(span_of), device=last.device) - firsts[span_of]
        asked = batch.teacher_rows if shortlist else batch.teacher_rows[:0]
        rows = torch.cat([inside, asked]).unique()
        is_asked = torch.isin(rows, asked)
        labels = self.head.columns(batch.teacher_labels.flatten()[rows])
        nats, tops = [last.new_zeros(0).float()], []
        for part, label, wanted in zip(*(every.split(chunk_size) for every in (rows, labels, is_asked)), strict=True):
            log_probs = losses.log_probs(self.head.decode(last[part]))
            nats.append(losses.cross_entropy(log_probs, label))
            if shortlist and wanted.any():
                tops.append(shortlist.of(log_probs[wanted]))
        told = losses.span_log_probs(torch.cat(nats)[torch.searchsorted(rows, inside)], span_of, len(lengths))
        if not shortlist or not tops:
            return told, shortlist and shortlist.of(last.new_zeros(0, self.head.num_rows))
        return told, TopTokens.joined(tops).rows(torch.searchsorted(rows[is_asked], asked))


def _copied(found, copy):
    if found is None or isinstance(found, torch.Tensor):
        return None if found is None else copy(found)
    parts = [getattr(found, f.name) for f in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else found
    made = [_copied(part, copy) for part in parts]
    return type(found)(*made) if dataclasses.is_dataclass(found) else type(found)(made)
