"""The teacher's outputs for one batch, full or as top-k log-probabilities, in the form that the losses use."""

import dataclasses

import torch

from kdlib.losses import divergences


@dataclasses.dataclass(frozen=True)
class TopKLogProbs:
    """The teacher's K most likely shared tokens at N positions, and one tail for all others.

    `ids` `[N, K]`: student ids, most likely first. `log_probs` `[N, K + 1]`: their log-probabilities, then the tail's.
    `best` `[N]`: the student id with the same bytes as the teacher's most likely token, -1 if there is none; or None.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    best: torch.Tensor | None = None

    def rows(self, index):
        """Returns the values at some positions (a slice or an index tensor)."""
        return TopKLogProbs(self.ids[index], self.log_probs[index], None if self.best is None else self.best[index])

    @classmethod
    def cat(cls, parts):
        """Concatenates several along the positions."""
        columns = [[getattr(part, name) for part in parts] for name in ("ids", "log_probs", "best")]
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))

    def to(self, device):
        return _map_tensors(self, lambda tensor: tensor.to(device))

    def truncate(self, k):
        """Keeps the `k` most likely tokens and adds the others to the tail."""
        if k >= self.ids.shape[1]:
            return self
        tail = self.log_probs[:, k:].logsumexp(dim=-1, keepdim=True)
        return TopKLogProbs(self.ids[:, :k], torch.cat([self.log_probs[:, :k], tail], dim=-1), self.best)


@dataclasses.dataclass(frozen=True)
class TeacherSignal:
    """The teacher's outputs at the N aligned positions of a batch. Fields that were not requested are None or empty.

    `hidden` `[N, Dt]`: last hidden states. `span_log_probs` `[N]`: log-likelihood of the span that starts at each
    position, in nats, 0 if none does. `topk`: `TopKLogProbs` from a teacher cache, instead of the full distribution.
    `layers`, `maps`, `vectors`: as in `forward.Features`. `partial_hidden` `[M, Dt]`: last hidden states at
    `Batch.inner_rows`. `partial_topk`: the cached result of `PartialTokens.top_k_outcomes`.
    """

    hidden: torch.Tensor | None
    span_log_probs: torch.Tensor | None = None
    topk: TopKLogProbs | None = None
    layers: tuple = ()
    maps: tuple = ()
    vectors: tuple = ()
    partial_hidden: torch.Tensor | None = None
    partial_topk: tuple | None = None

    def rows(self, index):
        """Returns hidden states, span likelihoods and top-k at some positions (a slice or an index tensor)."""
        tensors = (None if tensor is None else tensor[index] for tensor in (self.hidden, self.span_log_probs))
        return TeacherSignal(*tensors, self.topk and self.topk.rows(index))

    def map_tensors(self, function):
        """Returns a copy with `function` applied to every tensor."""
        return _map_tensors(self, function)

    def to(self, device):
        return self.map_tensors(lambda tensor: tensor.to(device))


@dataclasses.dataclass(frozen=True, eq=False)
class TopKSpec:
    """Settings of `TopKLogProbs`: the `k` most likely of `num_buckets` buckets at a `temperature`. The last bucket is
    the tail.

    Per column of the teacher's head: `bucket_of` `[Vt]`, and `same` `[Vt]`, the student id with the same bytes or -1.
    `student_ids` `[num_buckets - 1]`: the student id that represents each bucket.
    """

    k: int
    temperature: float
    num_buckets: int
    bucket_of: torch.Tensor
    same: torch.Tensor
    student_ids: torch.Tensor

    def select(self, log_probs_NV):
        """Computes `TopKLogProbs` from the teacher's log-probabilities `[N, Vt]`."""
        device = log_probs_NV.device
        bucket_logs = divergences.bucket_log_probs(log_probs_NV, self.bucket_of.to(device), self.num_buckets)
        if self.temperature != 1.0:
            bucket_logs = divergences.log_softmax(bucket_logs, self.temperature)
        top = bucket_logs[:, :-1].topk(min(self.k, self.num_buckets - 1), dim=-1).indices
        best = self.same.to(device)[log_probs_NV.argmax(dim=-1)]
        return TopKLogProbs(self.student_ids.to(device)[top], divergences.gather_with_tail(bucket_logs, top), best)


def _map_tensors(value, function):
    if value is None or isinstance(value, torch.Tensor):
        return None if value is None else function(value)
    is_record = dataclasses.is_dataclass(value)
    items = [getattr(value, field.name) for field in dataclasses.fields(value)] if is_record else value
    results = [_map_tensors(item, function) for item in items]
    return type(value)(*results) if is_record else type(value)(results)
