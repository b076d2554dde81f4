"""A pair's vocabularies in each other's tokens: buckets that can be compared, and what may follow inside a token.

A teacher's token is, in the student's words, a sequence of student tokens, and the other way round. Where one side has read
some tokens of such a sequence and the other stands at its beginning, the other's distribution, restricted to tokens that
begin with these, is one over what comes next: the chain rule over a trie of one vocabulary, spelled in tokens of the other.
Phan et al. 2024, arXiv 2410.09303, get next-byte probabilities by the same restriction.
"""

import dataclasses
import math

import numpy as np
import torch

from kdlib import data, losses, vocab

END = -1
"""Stands for a token that ends where another could follow."""
LEAST = 1e-6
"""Probability that all else, and the end of a teacher's token, have at least: float32 tells no less from a sum, and what
ends nowhere in the vocabulary may still be said in another way.
"""


def buckets_of(pair, kd_method):
    """The pair's `vocab.Buckets`, made once: reading two real vocabularies takes seconds, and every leg asks."""
    kind = kd_method if kd_method == "shared_vocab" else "shared_prefix"
    if kind not in pair.buckets:
        ours, theirs = pair.student_reader, pair.teacher.reader
        both = ours.vocabulary, theirs.vocabulary, pair.shared
        if kind == "shared_vocab":
            pair.buckets[kind] = vocab.tail_buckets(*both)
        else:
            first = data.first_tokens(ours, theirs.vocabulary.tokens), data.first_tokens(theirs, ours.vocabulary.tokens)
            pair.buckets[kind] = vocab.prefix_buckets(*both, *first)
    return pair.buckets[kind]


def tries_of(pair):
    """`(of the teacher's tokens, of the student's)`: each vocabulary's `Trie` in tokens of the other, made once a pair."""
    if "tries" not in pair.buckets:
        sides = (pair.student_reader, pair.head), (pair.teacher.reader, pair.teacher.head)
        pair.buckets["tries"] = tuple(
            Trie.of(data.spellings(reader, whole.vocabulary.tokens), student, whole_head.columns, head.columns)
            for student, ((reader, head), (whole, whole_head)) in (("pieces", sides), ("wholes", sides[::-1]))
        )
    return pair.buckets["tries"]


@dataclasses.dataclass(frozen=True, eq=False)
class Trie:
    """The tokens of one side, the *wholes*, spelled in the other side's, the *pieces*. A node stands for pieces read since
    the beginning of a whole, after which another may follow; nodes are numbered from 1, 0 is none. `student` says which side
    is the student's, `pieces` or `wholes`.

    `keys` `[C]`, ascending, are `node * num_pieces + piece` of a node (or of 0, the beginning) and a piece that leads on,
    `nodes` `[C]` where to. The wholes that begin with a node's pieces are `columns[firsts[node]:firsts[node + 1]]`, columns
    of their side's head; `places` says for each which of the node's outcomes follows in it, END where it ends here. The
    outcomes are `outcomes[begins[node]:begins[node + 1]]`, columns of the pieces' head, and an end where `ends[node]`.

    A student of pieces is to say an outcome or, as often as wholes end, something else: every node has an end. A teacher
    of pieces says the student's wholes in other ways too: a node has an end only where a whole does.
    """

    student: str
    num_pieces: int
    keys: np.ndarray
    nodes: np.ndarray
    firsts: np.ndarray
    columns: np.ndarray
    places: np.ndarray
    begins: np.ndarray
    outcomes: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, spellings, student, whole_columns=lambda ids: ids, piece_columns=lambda ids: ids):
        """From `data.spellings`, one for each id of the wholes; `*_columns` make ids columns of a head (`models.Head`)."""
        under, num = {}, 1 + max((max(spelling) for spelling in spellings if spelling), default=0)
        for whole, spelling in enumerate(spellings):
            for depth in range(1, len(spelling) + 1):
                following = spelling[depth] if depth < len(spelling) else END
                under.setdefault(spelling[:depth], []).append((whole, following))
        under = {read: np.array(pairs).T for read, pairs in under.items()}
        under = {read: pairs for read, pairs in under.items() if (pairs[1] != END).any()}
        number = {(): 0} | {read: node for node, read in enumerate(under, 1)}
        leads = sorted((number[read[:-1]] * num + read[-1], number[read]) for read in under)
        keys, nodes = np.array(leads, dtype=np.int64).reshape(-1, 2).T
        wholes, places, outcomes = ([np.zeros(0, dtype=np.int64)] for _ in range(3))
        for whole, following in under.values():
            names = np.unique(following[following != END])
            wholes.append(whole)
            places.append(np.where(following == END, END, np.searchsorted(names, following)))
            outcomes.append(names)
        ends = np.array([False] + [student == "pieces" or bool((each[1] == END).any()) for each in under.values()])
        firsts, begins = (np.append(0, np.cumsum([len(part) for part in each])) for each in (wholes, outcomes))
        columns = whole_columns(torch.from_numpy(np.concatenate(wholes))).numpy()
        named = piece_columns(torch.from_numpy(np.concatenate(outcomes))).numpy()
        return cls(student, num, keys, nodes, firsts, columns, np.concatenate(places), begins, named, ends)

    def walk(self, labels, firsts, stops):
        """`(positions, spans, nodes)`: positions of the pieces' side inside a span after which something may follow, span by
        span in order. Span i is predicted by the positions from `firsts[i]` up to (without) `stops[i]`; `labels` are the ids
        that follow each position. Arrays, int64.
        """
        spans, nodes, at = np.arange(len(firsts)), np.zeros(len(firsts), dtype=np.int64), firsts
        found = [np.zeros((3, 0), dtype=np.int64)]
        while len(spans):
            going = at + 1 < stops[spans]
            spans, nodes, at = spans[going], self._next(nodes[going], labels[at[going]]), at[going] + 1
            spans, nodes, at = (each[nodes > 0] for each in (spans, nodes, at))
            found.append(np.stack([at, spans, nodes]))
        every = np.concatenate(found, axis=1)
        return every[:, np.lexsort((every[0], every[1]))]

    def _next(self, nodes, pieces):
        if not len(self.keys):
            return np.zeros_like(nodes)
        keys = nodes * self.num_pieces + pieces
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        fits = (self.keys[places] == keys) & (pieces >= 0) & (pieces < self.num_pieces)
        return np.where(fits, self.nodes[places], 0)

    def divergence(self, wholes, pieces, nodes, divergence="forward_kl", temperature=1.0):
        """`T^2 D(teacher || student)` of what comes next at P positions of the pieces' side inside a token of the wholes',
        per position, nats, `[P]`; 0 where the wholes give nothing to any that begins with what was read.

        `wholes` is `(log-probabilities [N, U], rows [P])`, at the token's beginning, `pieces` the same of `[M, V]` at the
        position itself; rows and `nodes` `[P]` are arrays. The wholes' probabilities, given what was read, are summed by
        outcome; all else that the pieces' side says stands against the wholes that end here, or is left out.
        """
        given, said = wholes[0], pieces[0]
        places, outcomes, end_of = self._indices(wholes[1], pieces[1], nodes, given.device)
        (row, column, place), (at, named, owner), num = places, outcomes, len(nodes)
        told = said[at, named]
        sums = told.new_zeros(num).index_add(0, owner, told.exp())
        told = torch.cat([told, (1.0 - sums[end_of]).clamp_min(LEAST).log()])
        owner = torch.cat([owner, end_of])
        mass = given.new_zeros(len(owner)).index_add(0, place, given[row, column].exp())
        whole = mass.new_zeros(num).index_add(0, owner, mass)
        mass = (mass + losses.EMPTY).log() - (whole + losses.EMPTY).log()[owner]
        if self.student == "pieces":
            mass[len(at) :].clamp_(min=math.log(LEAST))  # the teacher's: without a gradient
        else:
            told = told - (sums.index_fill(0, end_of, 1.0) + losses.EMPTY).log()[owner]
        if temperature != 1.0:
            mass, told = (losses.log_probs_by(each, owner, num, temperature) for each in (mass, told))
        ours, theirs = (told, mass) if self.student == "pieces" else (mass, told)
        values = losses.distillation(ours[:, None], theirs[:, None], divergence, temperature)  # sums over outcomes
        return torch.where(whole > losses.EMPTY, values.new_zeros(num).index_add(0, owner, values), 0.0)

    def _indices(self, whole_rows, piece_rows, nodes, device):
        """`((row, column, place among the outcomes), (row, column, which of the nodes), which of the nodes have an end)`,
        flat: of the wholes under some nodes and of their outcomes; ends come behind all outcomes.
        """
        owner, entries = _flat(self.begins, nodes)
        outcomes = piece_rows[owner], self.outcomes[entries], owner
        starts, end_of = np.searchsorted(owner, np.arange(len(nodes))), np.flatnonzero(self.ends[nodes])
        behind = len(owner) + np.cumsum(self.ends[nodes]) - 1
        owner, entries = _flat(self.firsts, nodes)
        place = self.places[entries]
        place = np.where(place == END, behind[owner], starts[owner] + place)
        places = whole_rows[owner], self.columns[entries], place
        move = lambda array: torch.from_numpy(array).to(device, non_blocking=True)  # noqa: E731
        return tuple(map(move, places)), tuple(map(move, outcomes)), move(end_of)


def _flat(starts, nodes):
    """`(owner, entries)` of nodes whose entries lie from `starts[node]` up to `starts[node + 1]`, one behind the other."""
    sizes = starts[nodes + 1] - starts[nodes]
    owner = np.repeat(np.arange(len(nodes)), sizes)
    return owner, np.arange(len(owner)) + np.repeat(starts[nodes] + sizes - np.cumsum(sizes), sizes)


@dataclasses.dataclass(frozen=True)
class Inside:
    """What lies inside tokens of the other side in a block of rows: `at` the student's rows inside a teacher's token, and
    `logits` `[k, U]` of the teacher's positions inside a student's token; with the known row that starts its span, `span_of`
    and `inner_span_of`, and its `nodes` and `inner_nodes` of the tries. All but `logits` are arrays.
    """

    at: np.ndarray
    span_of: np.ndarray
    nodes: np.ndarray
    logits: torch.Tensor
    inner_span_of: np.ndarray
    inner_nodes: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """Where the positions of a micro-batch lie inside tokens of the other side, N spans, as arrays: of the student's
    `positions` (flat) their spans and `nodes`; of the teacher's positions inside a student's token, span by span, their
    places `inner` in `Batch.inner_rows`, their spans and nodes; `more` `[N]`: how many a span has of these.
    """

    positions: np.ndarray
    span_of: np.ndarray
    nodes: np.ndarray
    inner: np.ndarray
    inner_span_of: np.ndarray
    inner_nodes: np.ndarray
    more: np.ndarray

    @classmethod
    def of(cls, tries, batch):
        """The walk of a `Batch` through both `tries` (`tries_of`)."""
        whole = tries[0].walk(*batch.spans_of("student"))
        labels, firsts, stops = batch.spans_of("teacher")
        at, spans, nodes = tries[1].walk(labels, firsts, stops)
        sizes = np.maximum(stops - firsts - 1, 0)
        inner = at - firsts[spans] - 1 + (np.cumsum(sizes) - sizes)[spans]
        return cls(*whole, inner, spans, nodes, np.bincount(spans, minlength=len(firsts)))

    def taken(self, chunks):
        """Which of a signal's states `[hidden; inner]` the blocks of `fused.lay_out` are compared with, in their order."""
        blocks = [block for chunk in chunks for block in chunk]
        pieces = [(np.arange(b.known.start, b.known.stop), len(self.more) + self.inner[b.more]) for b in blocks]
        return np.concatenate([np.zeros(0, dtype=np.int64), *(piece for both in pieces for piece in both)])

    def in_order(self, order):
        """The same with `positions` as places in the flat positions `order`, in their order."""
        place = np.full(1 + max(order.max(initial=0), self.positions.max(initial=0)), -1)
        place[order] = np.arange(len(order))
        places = place[self.positions]
        by_place = np.argsort(places)
        mine = {"positions": places[by_place], "span_of": self.span_of[by_place], "nodes": self.nodes[by_place]}
        return dataclasses.replace(self, **mine)

    def split(self, other, block):
        """A block's `Inside`, and the logits that its known rows are compared with, from `other`, which holds both. After
        `in_order`.
        """
        num, known = block.known.stop - block.known.start, block.known.start
        mine = slice(*np.searchsorted(self.positions, [block.rows.start, block.rows.stop]))
        ours = self.positions[mine] - block.rows.start, self.span_of[mine] - known, self.nodes[mine]
        theirs = self.inner_span_of[block.more] - known, self.inner_nodes[block.more]
        return Inside(*ours, other[num:], *theirs), other[:num]
