"""What a teacher says of a batch, whole or in short, as the losses need it."""

import dataclasses

import torch

from kdlib.losses import divergences


@dataclasses.dataclass(frozen=True)
class TopKLogProbs:
    """The teacher's next token in short, at N positions: the K likeliest shared tokens and one tail for all else.

    `ids` `[N, K]`: student ids, the likeliest first; `log_probs` `[N, K + 1]`: of these and, last, of the tail; `best`
    `[N]`: the student id with the bytes of the single likeliest teacher token, -1 where there is none, or None.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    best: torch.Tensor | None = None

    def rows(self, part):
        """The same of some of the positions (a slice, or indices)."""
        return TopKLogProbs(self.ids[part], self.log_probs[part], None if self.best is None else self.best[part])

    @classmethod
    def cat(cls, parts):
        """Several, one behind the other."""
        every = [[getattr(part, name) for part in parts] for name in ("ids", "log_probs", "best")]
        return cls(*(None if each[0] is None else torch.cat(each) for each in every))

    def to(self, device):
        return _copied(self, lambda tensor: tensor.to(device))

    def truncate(self, k):
        """The same with the likeliest `k` tokens only; the others join the tail."""
        if k >= self.ids.shape[1]:
            return self
        tail = self.log_probs[:, k:].logsumexp(dim=-1, keepdim=True)
        return TopKLogProbs(self.ids[:, :k], torch.cat([self.log_probs[:, :k], tail], dim=-1), self.best)


@dataclasses.dataclass(frozen=True)
class TeacherSignal:
    """What the losses need of the teacher at the batch's N aligned positions.

    `hidden` `[N, Dt]`: last hidden states (None where a cache holds none); `span_log_probs` `[N]`: log-likelihood of the text of the
    span that starts there, in nats, 0 where none does (None where nobody asked); `topk`: `TopKLogProbs`, where these are all
    that is known of the distribution; `layers`, `maps`, `vectors`: as in `loading.Features`; `partial_hidden` `[M, Dt]`: last hidden
    states at `Batch.inner_rows` (None where nobody asked); `partial_topk`: from a cache, what the teacher said inside tokens, as
    `trie.PartialTokens.shortlists` gives it (None where nobody asked).
    """

    hidden: torch.Tensor | None
    span_log_probs: torch.Tensor | None = None
    topk: TopKLogProbs | None = None
    layers: tuple = ()
    maps: tuple = ()
    vectors: tuple = ()
    partial_hidden: torch.Tensor | None = None
    partial_topk: tuple | None = None

    def rows(self, part):
        """Hidden states, spans and top tokens of some of the positions (a slice, or indices)."""
        hidden, span_log_probs = (None if each is None else each[part] for each in (self.hidden, self.span_log_probs))
        return TeacherSignal(hidden, span_log_probs, self.topk and self.topk.rows(part))

    def copied(self, copy):
        """The signal of `copy(tensor)`s."""
        return _copied(self, copy)

    def to(self, device):
        """The same on a device."""
        return self.copied(lambda tensor: tensor.to(device))


@dataclasses.dataclass(frozen=True, eq=False)
class TopKSpec:
    """How a `TopKLogProbs` is made: the `k` likeliest of `num_buckets` buckets at a `temperature`, the last of them the tail.

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
        """The `TopKLogProbs` of a teacher's log-probabilities `[N, Vt]`."""
        device = log_probs_NV.device
        told = divergences.bucket_log_probs(log_probs_NV, self.bucket_of.to(device), self.num_buckets)
        if self.temperature != 1.0:
            told = divergences.log_softmax(told, self.temperature)
        likeliest = told[:, :-1].topk(min(self.k, self.num_buckets - 1), dim=-1).indices
        best = self.same.to(device)[log_probs_NV.argmax(dim=-1)]
        return TopKLogProbs(self.student_ids.to(device)[likeliest], divergences.gather_with_tail(told, likeliest), best)


def _copied(found, copy):
    if found is None or isinstance(found, torch.Tensor):
        return None if found is None else copy(found)
    parts = [getattr(found, f.name) for f in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else found
    made = [_copied(part, copy) for part in parts]
    return type(found)(*made) if dataclasses.is_dataclass(found) else type(found)(made)
