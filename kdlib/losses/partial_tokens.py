"""Where a text lies inside tokens of the other side: the walk of a micro-batch through both tries, block by block."""

import dataclasses

import numpy as np
import torch

from kdlib.losses import divergences
from kdlib.losses.teacher_signal import TopKLogProbs

AT_ONCE = 256
"""Positions worked off at once where a teacher's words are put in short: a node may have as many outcomes as a vocabulary
has tokens.
"""


@dataclasses.dataclass(frozen=True)
class PartialTokenBlock:
    """What lies inside tokens of the other side in a block of rows: `at` the student's rows inside a teacher's token, and
    `logits` `[k, U]` of the teacher's positions inside a student's token; with the known row that starts its span, `span_of`
    and `inner_span_of`, and its `nodes` and `inner_nodes` of the tries, all arrays. From a teacher cache there are no
    logits: `said` and `inner_log_probs` are the `Trie.shortlist`s.
    """

    at: np.ndarray
    span_of: np.ndarray
    nodes: np.ndarray
    said: TopKLogProbs | None
    inner_span_of: np.ndarray
    inner_nodes: np.ndarray
    inner_log_probs: TopKLogProbs | None
    logits: torch.Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class PartialTokens:
    """Where the positions of a micro-batch lie inside tokens of the other side, N spans, as arrays: of the student's
    `positions` (flat) their spans and `nodes`; of the teacher's positions inside a student's token, span by span, their
    places `inner` in `Batch.inner_rows`, their spans and nodes; `more` `[N]`: how many a span has of these. `said`: what a
    cached teacher said at both, or None.
    """

    positions: np.ndarray
    span_of: np.ndarray
    nodes: np.ndarray
    inner: np.ndarray
    inner_span_of: np.ndarray
    inner_nodes: np.ndarray
    more: np.ndarray
    said: tuple = (None, None)

    @classmethod
    def build(cls, tries, batch, said=None):
        """The walk of a `Batch` through both `tries` (`trie.tries_of`)."""
        ours, theirs = batch.spans_of("student"), batch.spans_of("teacher")
        whole = _agreeing(tries[0], ours, theirs)
        (_, firsts, stops), (at, spans, nodes) = theirs, _agreeing(tries[1], theirs, ours)
        sizes = np.maximum(stops - firsts - 1, 0)
        inner = at - firsts[spans] - 1 + (np.cumsum(sizes) - sizes)[spans]
        more = np.bincount(spans, minlength=len(firsts))
        return cls(*whole, inner, spans, nodes, more, said or (None, None))

    def shortlists(self, tries, signal, decode, bucket_of, sizes, temperature):
        """What the teacher of a `TeacherSignal` with `inner` states says at both kinds of positions, in short:
        `Trie.shortlist`s of so many outcomes, in their order. `decode` makes logits of states; `bucket_of` `[Vt]` is the
        bucket of each.
        """

        def told(trie, states):
            log_probs = divergences.log_softmax(decode(states))
            if trie.student == "pieces":
                return log_probs
            return divergences.bucket_log_probs(log_probs, bucket_of.to(log_probs.device), trie.tail + 1)

        kinds = (
            (tries[0], signal.hidden, self.span_of, self.nodes), (tries[1], signal.partial_hidden, self.inner, self.inner_nodes)
        )  # fmt: skip
        found = []
        for (trie, states, rows, nodes), k in zip(kinds, sizes, strict=True):
            parts = [trie.shortlist(told(trie, states[:0]), rows[:0], nodes[:0], k)]
            for i in range(0, len(rows), AT_ONCE):
                which, row = np.unique(rows[i : i + AT_ONCE], return_inverse=True)
                log_probs = told(trie, states[torch.from_numpy(which).to(states.device)])
                parts.append(trie.shortlist(log_probs, row, nodes[i : i + AT_ONCE], k, temperature))
            found.append(TopKLogProbs.cat(parts))
        return tuple(found)

    def by_window(self, rows_by_window):
        """`(ours, theirs)`: how many of each kind of positions lie in each window, of as many spans as given."""
        window_of = np.repeat(np.arange(len(rows_by_window)), rows_by_window)
        return tuple(
            np.bincount(window_of[spans], minlength=len(rows_by_window)).tolist()
            for spans in (self.span_of, self.inner_span_of)
        )

    def teacher_row_order(self, chunks):
        """Which of a signal's states `[hidden; inner]` the blocks of `chunked_head.plan_blocks` are compared with, in
        their order.
        """
        blocks = [block for chunk in chunks for block in chunk]
        pieces = [(np.arange(b.known.start, b.known.stop), len(self.more) + self.inner[b.more]) for b in blocks]
        return np.concatenate([np.zeros(0, dtype=np.int64), *(piece for both in pieces for piece in both)])

    def reordered(self, order):
        """The same with `positions` as places in the flat positions `order` of `chunked_head.plan_blocks`; they stay
        ascending.
        """
        place = np.full(1 + max(order.max(initial=0), self.positions.max(initial=0)), -1)
        place[order] = np.arange(len(order))
        return dataclasses.replace(self, positions=place[self.positions])

    def for_block(self, other, block):
        """A block's `PartialTokenBlock`, and the logits that its known rows are compared with, from `other`, which holds both (None
        where a cache says it in short). After `reordered`.
        """
        num, known = block.known.stop - block.known.start, block.known.start
        mine = slice(*np.searchsorted(self.positions, [block.rows.start, block.rows.stop]))
        said, inner_log_probs = self.said[0] and self.said[0].rows(mine), self.said[1] and self.said[1].rows(block.more)
        ours = self.positions[mine] - block.rows.start, self.span_of[mine] - known, self.nodes[mine], said
        theirs = self.inner_span_of[block.more] - known, self.inner_nodes[block.more], inner_log_probs
        return PartialTokenBlock(
            *ours, *theirs, None if other is None else other[num:]
        ), None if other is None else other[:num]


def agreeing(buckets, batch):
    """Whether at the aligned positions of a `Batch` the text's own next tokens lie in one bucket, `[N]`."""
    ours, theirs = (labels[firsts] for labels, firsts, _ in map(batch.spans_of, ("student", "teacher")))
    return torch.from_numpy(buckets.student[ours] == buckets.teacher[theirs])


def _agreeing(trie, pieces, wholes):
    """`Trie.walk` of the pieces' side, `(labels, firsts, stops)`, at the places where the text's own tokens agree."""
    at, spans, nodes = trie.match(*pieces)
    kept = trie.agrees(nodes, wholes[0][wholes[1][spans]], pieces[0][at])
    return at[kept], spans[kept], nodes[kept]
