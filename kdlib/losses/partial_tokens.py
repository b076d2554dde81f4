"""Positions of a micro-batch that lie inside a token of the other tokenizer, with their trie nodes, block by block."""

import dataclasses

import numpy as np
import torch

from kdlib.losses import divergences
from kdlib.losses.teacher_signal import TopKLogProbs

MAX_POSITIONS = 256
"""Positions reduced to top-k outcomes at once: a node may have as many outcomes as a vocabulary has tokens."""


@dataclasses.dataclass(frozen=True)
class PartialTokenBlock:
    """Part of `PartialTokens` in one block of rows.

    `student_rows`: rows of the block inside a teacher token. `inner_logits` `[k, U]`: the teacher's logits at its
    positions inside a student token, or None with a teacher cache. For both kinds of positions, `span_of` and
    `inner_span_of` are the aligned row that starts their span, `nodes` and `inner_nodes` their trie nodes (arrays), and
    `topk` and `inner_topk` the cached teacher's `Trie.shortlist`.
    """

    student_rows: np.ndarray
    span_of: np.ndarray
    nodes: np.ndarray
    topk: TopKLogProbs | None
    inner_span_of: np.ndarray
    inner_nodes: np.ndarray
    inner_topk: TopKLogProbs | None
    inner_logits: torch.Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class PartialTokens:
    """Positions inside a token of the other side, in a micro-batch of N spans, as arrays.

    `positions`: the student's (flat) positions inside a teacher token, with their spans `span_of` and trie `nodes`.
    `inner_positions`: the teacher's positions inside a student token, as indices into `Batch.inner_rows`, span by span,
    with `inner_span_of` and `inner_nodes`. `num_inner` `[N]` counts them by span. `partial_topk`: the cached teacher's
    `TopKLogProbs` for both kinds of positions, or Nones.
    """

    positions: np.ndarray
    span_of: np.ndarray
    nodes: np.ndarray
    inner_positions: np.ndarray
    inner_span_of: np.ndarray
    inner_nodes: np.ndarray
    num_inner: np.ndarray
    partial_topk: tuple = (None, None)

    @classmethod
    def build(cls, tries, batch, partial_topk=None):
        """Matches a `Batch` against both `tries` (`trie.tries_of`)."""
        student, teacher = batch.spans_of("student"), batch.spans_of("teacher")
        (_, starts, ends), (positions, spans, nodes) = teacher, _matches(tries[1], teacher, student)
        num_inner_rows = np.maximum(ends - starts - 1, 0)
        inner_positions = positions - starts[spans] - 1 + (np.cumsum(num_inner_rows) - num_inner_rows)[spans]
        student_side, num_inner = _matches(tries[0], student, teacher), np.bincount(spans, minlength=len(starts))
        return cls(*student_side, inner_positions, spans, nodes, num_inner, partial_topk or (None, None))

    def top_k_outcomes(self, tries, signal, decode, bucket_of, sizes, temperature):
        """Returns the teacher's top-k outcomes at both kinds of positions, as two `Trie.shortlist`s.

        `signal` has `partial_hidden`. `decode` maps hidden states to logits, `bucket_of` `[Vt]` logits to buckets.
        `sizes` are the two values of k.
        """

        def log_probs_of(trie, states):
            log_probs = divergences.log_softmax(decode(states))
            if trie.student_side == "inner":
                return log_probs
            return divergences.bucket_log_probs(log_probs, bucket_of.to(log_probs.device), trie.tail + 1)

        kinds = (
            (tries[0], signal.hidden, self.span_of, self.nodes),
            (tries[1], signal.partial_hidden, self.inner_positions, self.inner_nodes),
        )
        results = []
        for (trie, states, rows, nodes), k in zip(kinds, sizes, strict=True):
            parts = [trie.shortlist(log_probs_of(trie, states[:0]), rows[:0], nodes[:0], k)]
            for i in range(0, len(rows), MAX_POSITIONS):
                unique_rows, row = np.unique(rows[i : i + MAX_POSITIONS], return_inverse=True)
                log_probs = log_probs_of(trie, states[torch.from_numpy(unique_rows).to(states.device)])
                parts.append(trie.shortlist(log_probs, row, nodes[i : i + MAX_POSITIONS], k, temperature))
            results.append(TopKLogProbs.cat(parts))
        return tuple(results)

    def count_by_window(self, rows_by_window):
        """Returns how many positions of each kind lie in each window, as two lists; `rows_by_window` counts its spans."""
        window_of = np.repeat(np.arange(len(rows_by_window)), rows_by_window)
        return tuple(
            np.bincount(window_of[spans], minlength=len(rows_by_window)).tolist()
            for spans in (self.span_of, self.inner_span_of)
        )

    def teacher_row_order(self, chunks):
        """Returns the blocks' teacher rows, in order, as indices into the teacher's `[hidden; partial_hidden]`."""
        order = [np.zeros(0, dtype=np.int64)]
        for block in (block for chunk in chunks for block in chunk):
            inner_positions = self.inner_positions[block.extra]
            order += [np.arange(block.aligned.start, block.aligned.stop), len(self.num_inner) + inner_positions]
        return np.concatenate(order)

    def reordered(self, order):
        """Returns a copy whose `positions` are indices into the flat positions `order`; they stay ascending."""
        index_of = np.full(1 + max(order.max(initial=0), self.positions.max(initial=0)), -1)
        index_of[order] = np.arange(len(order))
        return dataclasses.replace(self, positions=index_of[self.positions])

    def for_block(self, logits, block):
        """Splits a block's teacher logits (None with a cache) into `(PartialTokenBlock, aligned)`, after `reordered`."""
        first, num_aligned = block.aligned.start, block.aligned.stop - block.aligned.start
        inside = slice(*np.searchsorted(self.positions, [block.rows.start, block.rows.stop]))
        topk, inner_topk = self.partial_topk
        partial = PartialTokenBlock(
            student_rows=self.positions[inside] - block.rows.start,
            span_of=self.span_of[inside] - first,
            nodes=self.nodes[inside],
            topk=topk and topk.rows(inside),
            inner_span_of=self.inner_span_of[block.extra] - first,
            inner_nodes=self.inner_nodes[block.extra],
            inner_topk=inner_topk and inner_topk.rows(block.extra),
            inner_logits=None if logits is None else logits[num_aligned:],
        )
        return partial, None if logits is None else logits[:num_aligned]


def agreement_mask(buckets, batch):
    """Returns whether the text's own next tokens lie in one bucket at each aligned position of a `Batch`, bool `[N]`."""
    student, teacher = (labels[starts] for labels, starts, _ in map(batch.spans_of, ("student", "teacher")))
    return torch.from_numpy(buckets.student[student] == buckets.teacher[teacher])


def _matches(trie, inner, outer):
    """Returns `Trie.match` of the inner tokens at positions where the text's own tokens share an outcome."""
    positions, spans, nodes = trie.match(*inner)
    kept = trie.agrees(nodes, outer[0][outer[1][spans]], inner[0][positions])
    return positions[kept], spans[kept], nodes[kept]
