"""A pair's vocabularies in terms of each other: comparable buckets, and next-token distributions inside a token.

A token of one side (an outer token) is a sequence of tokens of the other side (inner tokens). One model may have read
some inner tokens of such a sequence while the other model stands at its beginning. The latter's distribution,
restricted to outer tokens that start with what was read, then gives a distribution over the next inner token: the chain
rule over a trie. Phan et al. 2024, arXiv 2410.09303, compute next-byte probabilities by the same restriction.
"""

import collections
import dataclasses
import functools
import math

import numpy as np
import torch

from kdlib.align import vocab
from kdlib.data import dataset, tokenize
from kdlib.losses import divergences
from kdlib.losses.teacher_signal import TopKLogProbs

SIDES = ("student", "teacher")
CONFLICT_TOKENS = 2**20
"""Maximum number of student tokens read to decide which buckets to join."""
MIN_CONFLICTS, MIN_CONFLICT_SHARE = 2, 0.3
"""Two buckets are joined if they conflict at least MIN_CONFLICTS times, and at least this share of the times that the
rarer one comes next. Positions of rarer conflicts have no signal: joining all would leave few buckets in small
vocabularies.
"""
END = -1
"""Outcome of an outer token that ends where another inner token could follow."""
MIN_MASS = 1e-6
"""Minimum probability of the end outcome. It is a difference of float32 sums, which resolve no less, and a text may end
a token in ways that the vocabulary does not list.
"""
NO_MASS = -68.0
"""Log-probabilities at or below this stand for zero; `divergences.TINY`, rounded to float16, lies below."""


def buckets_of(pair, kd_method):
    """Returns the pair's `vocab.Buckets` for a `kd_method`, cached on the pair because it takes seconds.

    Except for `shared_vocab`, buckets are joined that the two tokenizations of the pair's own text often confuse.
    """
    kind = kd_method if kd_method == "shared_vocab" else "first_token"
    if kind not in pair.buckets:
        if kind == "shared_vocab":
            vocabularies = pair.student_reader.vocabulary, pair.teacher.reader.vocabulary
            pair.buckets[kind] = vocab.tail_buckets(*vocabularies, pair.shared)
        else:
            buckets, text = unjoined_buckets(pair), list(dataset.sample_windows(pair.text, CONFLICT_TOKENS))
            conflicts, _ = count_conflicts(text, buckets, spellings_of(pair))
            totals = count_buckets(text, buckets)
            limits = {(a, b): max(MIN_CONFLICTS, MIN_CONFLICT_SHARE * min(totals[a], totals[b])) for a, b in conflicts}
            joined = [both for both, limit in limits.items() if conflicts[both] >= limit and buckets.tail not in both]
            pair.buckets[kind] = vocab.merge_buckets(buckets, joined)
    return pair.buckets[kind]


def unjoined_buckets(pair):
    """Returns the pair's `vocab.prefix_buckets` before any are joined, cached on the pair."""
    if "unjoined" not in pair.buckets:
        student, teacher = pair.student_reader, pair.teacher.reader
        student_first = tokenize.first_tokens(student, teacher.vocabulary.tokens)
        teacher_first = tokenize.first_tokens(teacher, student.vocabulary.tokens)
        vocabularies = student.vocabulary, teacher.vocabulary
        pair.buckets["unjoined"] = vocab.prefix_buckets(*vocabularies, pair.shared, student_first, teacher_first)
    return pair.buckets["unjoined"]


def spellings_of(pair):
    """Returns `[teacher's tokens as student ids, student's tokens as teacher ids]`, cached on the pair."""
    if "spellings" not in pair.buckets:
        readers = pair.student_reader, pair.teacher.reader
        sides = zip(readers, readers[::-1], strict=True)
        pair.buckets["spellings"] = [tokenize.spellings(reader, other.vocabulary.tokens) for reader, other in sides]
    return pair.buckets["spellings"]


def count_conflicts(text, buckets, spellings):
    """Returns `({(bucket, bucket): count}, number of common boundaries)` of windows: the positions where teacher and
    student would contradict each other, if each were certain of the text in its own tokens.

    At a common boundary: the next tokens of the two sides lie in different buckets. Inside an outer token: the text
    continues with an inner token of another bucket than the outer token's spelling.
    """
    conflicts, num_boundaries = collections.Counter(), 0
    for window in text:
        names = "labels", "rows", "span_ends"
        student, teacher = ([getattr(window, f"{side}_{name}") for name in names] for side in SIDES)
        num_boundaries += len(student[1])
        next_ids = student[0][student[1]], teacher[0][teacher[1]]
        next_buckets = zip(buckets.student[next_ids[0]], buckets.teacher[next_ids[1]], strict=True)
        conflicts.update((int(a), int(b)) for a, b in next_buckets if a != b)
        for (labels, starts, ends), bucket_of, outer_ids, spelling_of in (
            (student, buckets.student, next_ids[1], spellings[0]),
            (teacher, buckets.teacher, next_ids[0], spellings[1]),
        ):
            for i in np.flatnonzero(ends > starts + 1):
                steps = zip(spelling_of[outer_ids[i]], labels[starts[i] : ends[i]])  # noqa: B905 - the shorter decides
                depth, (a, b) = next(((d, both) for d, both in enumerate(steps) if both[0] != both[1]), (0, (0, 0)))
                if depth and bucket_of[a] != bucket_of[b]:
                    conflicts[int(bucket_of[a]), int(bucket_of[b])] += 1
    return conflicts, num_boundaries


def count_buckets(text, buckets):
    """Returns how often each bucket comes next at common boundaries: the larger count of the two sides, `[num]`."""
    counts = np.zeros((2, buckets.num), dtype=np.int64)
    for window in text:
        for side, bucket_of in enumerate((buckets.student, buckets.teacher)):
            labels, rows = (getattr(window, f"{SIDES[side]}_{name}") for name in ("labels", "rows"))
            np.add.at(counts[side], bucket_of[labels[rows]], 1)
    return counts.max(axis=0)


def tries_of(pair):
    """Returns `(trie of the teacher's tokens, trie of the student's tokens)`, cached on the pair."""
    if "tries" not in pair.buckets:
        buckets, heads = buckets_of(pair, "byte_prefix"), (pair.teacher.head, pair.head)
        sides = zip(spellings_of(pair), ("inner", "outer"), (buckets.student, buckets.teacher), heads, strict=True)
        pair.buckets["tries"] = tuple(
            Trie.build(spellings, student_side, bucket_of, buckets.tail, head.columns if head else lambda ids: ids)
            for spellings, student_side, bucket_of, head in sides  # a cached teacher has no head, and needs no columns
        )
    return pair.buckets["tries"]


@dataclasses.dataclass(frozen=True, eq=False)
class Trie:
    """Trie of one vocabulary (outer tokens) tokenized by the other tokenizer (inner tokens).

    A node is a proper prefix of an outer token, as inner token ids. Nodes are numbered from 1; 0 is the root, or no
    node. `student_side` says which tokens are the student's, `"inner"` or `"outer"`.

    `keys` `[C]`: sorted `node * num_inner + inner id` of every edge; `children` `[C]`: the nodes that they lead to.
    `outer_ids[outer_starts[node]:outer_starts[node + 1]]`: the outer tokens that start with the node's prefix. For each
    of them, `columns` holds the column of the outer model's head, and `outcome_of` its outcome among the node's, END
    for none.

    An outcome is the bucket of the next inner token. `bucket_of` maps inner ids to buckets; inner tokens in the bucket
    `tail` count as an end. The outcomes of a node are `outcomes[outcome_starts[node]:outcome_starts[node + 1]]`, and an
    end if `ends[node]`. With inner tokens of the student every node has an end, which stands for all else. A teacher of
    inner tokens can write the student's tokens in other ways too, so a node has an end only if an outer token ends
    there.
    """

    student_side: str
    num_inner: int
    keys: np.ndarray
    children: np.ndarray
    outer_starts: np.ndarray
    outer_ids: np.ndarray
    columns: np.ndarray
    outcome_of: np.ndarray
    outcome_starts: np.ndarray
    outcomes: np.ndarray
    ends: np.ndarray
    bucket_of: np.ndarray
    tail: int

    @classmethod
    def build(cls, spellings, student_side, bucket_of, tail, outer_columns=lambda ids: ids):
        """Builds a trie from `tokenize.spellings`, one per outer id. `bucket_of` holds the buckets of inner ids, the
        last of which is `tail`. `outer_columns` maps outer ids to columns of a `Head`.
        """
        nodes, num_inner = _nodes_of(spellings, bucket_of, tail), 1 + max(map(max, filter(None, spellings)), default=0)
        node_of = {(): 0} | {prefix: node for node, prefix in enumerate(nodes, 1)}
        edges = sorted((node_of[prefix[:-1]] * num_inner + prefix[-1], node_of[prefix]) for prefix in nodes)
        keys, children = np.array(edges, dtype=np.int64).reshape(-1, 2).T
        outer_ids, outcome_of, outcomes = ([np.zeros(0, dtype=np.int64)] for _ in range(3))
        for ids, next_buckets in nodes.values():
            buckets = np.unique(next_buckets[next_buckets != END])
            outer_ids.append(ids)
            outcome_of.append(np.where(next_buckets == END, END, np.searchsorted(buckets, next_buckets)))
            outcomes.append(buckets)
        ends = np.array([False] + [student_side == "inner" or bool((b == END).any()) for _, b in nodes.values()])
        outer_starts, outcome_starts = (np.append(0, np.cumsum(list(map(len, a)))) for a in (outer_ids, outcomes))
        outer_ids, outcome_of, outcomes = map(np.concatenate, (outer_ids, outcome_of, outcomes))
        columns = outer_columns(torch.from_numpy(outer_ids)).numpy()
        return cls(
            student_side, num_inner, keys, children, outer_starts, outer_ids, columns, outcome_of, outcome_starts,
            outcomes, ends, bucket_of, tail,
        )  # fmt: skip

    def agrees(self, nodes, outer_ids, inner_ids):
        """Returns whether the text's own outer and next inner tokens at `nodes` have the same outcome, `[P]`."""
        entry, is_entry = _find(self._outer_keys, nodes * self._num_outer + outer_ids.clip(max=self._num_outer - 1))
        buckets = self.bucket_of[inner_ids]
        index, is_outcome = _find(self._outcome_keys, nodes * self.tail + buckets.clip(max=self.tail - 1))
        outcome = np.where(is_outcome & (buckets < self.tail), index - self.outcome_starts[nodes], END)
        return is_entry & (self.outcome_of[entry] == outcome) if len(self.outcome_of) else is_entry

    @functools.cached_property
    def _num_outer(self):
        return 2 + int(self.outer_ids.max(initial=0))  # one id more than there are, which no node has

    @functools.cached_property
    def _outer_keys(self):
        return _owners(self.outer_starts) * self._num_outer + self.outer_ids

    @functools.cached_property
    def _outcome_keys(self):
        return _owners(self.outcome_starts) * self.tail + self.outcomes

    def match(self, labels, starts, ends):
        """Returns the inner side's positions inside an outer token: `(positions, spans, nodes)`, int64 `[3, P]`, by
        span.

        `labels` are the inner ids that follow each position. Positions `starts[i]` to `ends[i] - 1` predict span i.
        """
        spans, nodes, at = np.arange(len(starts)), np.zeros(len(starts), dtype=np.int64), starts
        matches = [np.zeros((3, 0), dtype=np.int64)]
        while len(spans):
            inside = at + 1 < ends[spans]
            spans, nodes, at = spans[inside], self._children(nodes[inside], labels[at[inside]]), at[inside] + 1
            spans, nodes, at = (array[nodes > 0] for array in (spans, nodes, at))
            matches.append(np.stack([at, spans, nodes]))
        matches = np.concatenate(matches, axis=1)
        return matches[:, np.lexsort((matches[0], matches[1]))]

    def _children(self, nodes, inner_ids):
        edges, is_edge = _find(self.keys, nodes * self.num_inner + inner_ids)
        is_edge &= (inner_ids >= 0) & (inner_ids < self.num_inner)
        return np.where(is_edge, self.children[edges], 0) if len(self.keys) else np.zeros_like(nodes)

    def divergence(self, outer, inner, nodes, divergence="forward_kl", temperature=1.0):
        """Returns `T^2 D(teacher || student)` of the next outcome at P positions inside an outer token, in nats, `[P]`.

        `outer` is `(token log-probabilities [N, U], rows [P])` at the outer token's beginning. `inner` is `(bucket
        log-probabilities [M, B], rows [P])` at the positions themselves. Rows and `nodes` `[P]` are arrays. Outer
        probabilities, given the prefix, are summed by outcome. All other inner probability is compared with the outer
        tokens that end there, or left out. The value is 0 if the outer side gives the prefix no probability.
        """
        outcomes = Outcomes.build(self, nodes, outer[0].device)
        outer_logs, has_mass = self._outer_outcomes(*outer, outcomes)
        inner_logs = self._inner_outcomes(*inner, outcomes)
        both = (inner_logs, outer_logs) if self.student_side == "inner" else (outer_logs, inner_logs)
        student, teacher = (outcomes.soften(logs, temperature) for logs in both)
        values = divergences.tempered_divergence(student[:, None], teacher[:, None], divergence, temperature)
        return torch.where(has_mass, values.new_zeros(len(nodes)).index_add(0, outcomes.owner, values), 0.0)

    def shortlist(self, log_probs, rows, nodes, k, temperature=1.0):
        """Returns the teacher's `TopKLogProbs` over outcomes at P positions: its `k` most likely and a tail.

        `ids` are indices among the node's outcomes. `log_probs` are the teacher's, of tokens or of buckets; `rows` and
        `nodes` `[P]` are arrays. Missing outcomes, and all at positions without mass, have probability
        `divergences.TINY`.
        """
        outcomes = Outcomes.build(self, nodes, log_probs.device)
        logs, has_mass = self._side_outcomes(log_probs, rows, outcomes, self.student_side == "outer")
        logs, num = outcomes.soften(logs, temperature), outcomes.num
        sizes = self.outcome_starts[nodes + 1] - self.outcome_starts[nodes]
        table = logs.new_full((len(nodes), max(k, sizes.max(initial=0))), math.log(divergences.TINY))
        owner = outcomes.owner[:num]
        table[owner, torch.arange(num, device=logs.device) - outcomes.starts[owner]] = logs[:num]
        top = table.topk(k, dim=1)
        tail = table.exp().scatter(1, top.indices, 0.0).sum(dim=1).index_add(0, outcomes.owner[num:], logs[num:].exp())
        short = torch.cat([top.values, (tail + divergences.TINY).log()[:, None]], dim=1)
        return TopKLogProbs(top.indices, short.where(has_mass[:, None], math.log(divergences.TINY)))

    def divergence_from_shortlist(self, topk, log_probs, rows, nodes, divergence="forward_kl", temperature=1.0):
        """Returns `divergence` over the outcomes of the teacher's `shortlist` and one tail, `[P]`. `log_probs` are the
        student's, of tokens or buckets. Outcomes with nearly no teacher probability join the tail.
        """
        outcomes = Outcomes.build(self, nodes, log_probs.device)
        logs, has_mass = self._side_outcomes(log_probs, rows, outcomes, self.student_side == "inner")
        logs = outcomes.soften(logs, temperature)
        is_kept = topk.log_probs[:, :-1] > NO_MASS
        index = torch.where(is_kept, outcomes.starts[:, None] + topk.ids, 0)
        kept = torch.where(is_kept, logs[index], math.log(divergences.TINY))
        in_tail = torch.ones_like(logs).scatter_reduce(0, index.flatten(), 1.0 - is_kept.flatten().to(logs), "amin")
        tail = logs.new_zeros(len(nodes)).index_add(0, outcomes.owner, in_tail * logs.exp())
        student = torch.cat([kept, (tail + divergences.TINY).log()[:, None]], dim=1)
        values = divergences.tempered_divergence(student, topk.log_probs, divergence, temperature)
        return torch.where(has_mass & (topk.log_probs > NO_MASS).any(dim=1), values, 0.0)

    def _side_outcomes(self, log_probs, rows, outcomes, is_inner):
        """Returns `(log-probabilities of outcomes and ends [F], whether there is any mass [P])` of one side."""
        if is_inner:
            return self._inner_outcomes(log_probs, rows, outcomes), torch.ones_like(outcomes.starts, dtype=torch.bool)
        return self._outer_outcomes(log_probs, rows, outcomes)

    def _outer_outcomes(self, log_probs, rows, outcomes):
        """Returns the same of the outer side: probabilities given the prefix that was read."""
        owner, entries = _expand(self.outer_starts, outcomes.nodes)
        end_index = outcomes.num + np.cumsum(self.ends[outcomes.nodes]) - 1
        index = self.outcome_of[entries]
        index = np.where(index == END, end_index[owner], outcomes.starts_array[owner] + index)
        row, column, index = _to_device((rows[owner], self.columns[entries], index), log_probs.device)
        mass = log_probs.new_zeros(len(outcomes.owner)).index_add(0, index, log_probs[row, column].exp())
        total = mass.new_zeros(len(outcomes.nodes)).index_add(0, outcomes.owner, mass)
        logs = (mass + divergences.TINY).log() - (total + divergences.TINY).log()[outcomes.owner]
        if self.student_side == "inner":
            logs[outcomes.num :].clamp_(min=math.log(MIN_MASS))  # in place: the teacher's have no gradient
        return logs, total > divergences.TINY

    def _inner_outcomes(self, log_probs, rows, outcomes):
        num, owner = outcomes.num, outcomes.owner
        row, column = _to_device((rows[outcomes.owner_array[:num]], self.outcomes[outcomes.entries]), log_probs.device)
        logs = log_probs[row, column]
        sums = logs.new_zeros(len(outcomes.nodes)).index_add(0, owner[:num], logs.exp())
        with_end = owner[num:]
        logs = torch.cat([logs, (1.0 - sums[with_end]).clamp_min(MIN_MASS).log()])
        if self.student_side == "outer":
            logs = logs - (sums.index_fill(0, with_end, 1.0) + divergences.TINY).log()[owner]
        return logs


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes:
    """Flat layout of the outcomes of P `nodes`: those of each node in turn, then one end for every node that has one.

    `owner` `[F]`: the node of an outcome. `starts` `[P]`: where the outcomes of a node begin. Both exist as tensors and
    as arrays. `entries`: positions in `Trie.outcomes`; `num` of them are no ends.
    """

    nodes: np.ndarray
    entries: np.ndarray
    owner_array: np.ndarray
    starts_array: np.ndarray
    owner: torch.Tensor
    starts: torch.Tensor

    @property
    def num(self):
        return len(self.entries)

    @classmethod
    def build(cls, trie, nodes, device):
        owner, entries = _expand(trie.outcome_starts, nodes)
        sizes = trie.outcome_starts[nodes + 1] - trie.outcome_starts[nodes]
        arrays = np.append(owner, np.flatnonzero(trie.ends[nodes])), np.cumsum(sizes) - sizes
        return cls(nodes, entries, *arrays, *_to_device(arrays, device))

    def soften(self, logs, temperature):
        """Returns the log-probabilities of every node's distribution at a temperature."""
        if temperature == 1.0:
            return logs
        return divergences.segment_log_softmax(logs, self.owner, len(self.nodes), temperature)


def _nodes_of(spellings, bucket_of, tail):
    """Returns `{proper prefix of an outer token: (outer ids, next buckets)}`: the outer tokens that start with these
    inner ids, and the bucket of the next inner id of each; END if it ends there or the next bucket is `tail`.
    """
    nodes = {}
    for outer_id, spelling in enumerate(spellings):
        for depth in range(1, len(spelling) + 1):
            bucket = int(bucket_of[spelling[depth]]) if depth < len(spelling) else END
            nodes.setdefault(spelling[:depth], []).append((outer_id, bucket))
    nodes = {prefix: np.array(pairs).T for prefix, pairs in nodes.items()}
    nodes = {prefix: pairs for prefix, pairs in nodes.items() if (pairs[1] != END).any()}  # others are whole tokens
    for _, next_buckets in nodes.values():
        next_buckets[next_buckets == tail] = END
    return nodes


def _owners(starts):
    """Returns the node of each entry, if those of a node begin at `starts[node]`."""
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def _find(keys, queries):
    """Returns `(indices, whether present)` of queries in sorted `keys`."""
    if not len(keys):
        return np.zeros(len(queries), dtype=np.int64), np.zeros(len(queries), dtype=bool)
    indices = np.searchsorted(keys, queries).clip(max=len(keys) - 1)
    return indices, keys[indices] == queries


def _to_device(arrays, device):
    return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)


def _expand(starts, nodes):
    """Returns `(owner, entries)`: the entries `starts[node]` up to `starts[node + 1]` of every node, concatenated."""
    sizes = starts[nodes + 1] - starts[nodes]
    owner = np.repeat(np.arange(len(nodes)), sizes)
    return owner, np.arange(len(owner)) + np.repeat(starts[nodes] + sizes - np.cumsum(sizes), sizes)
