"""A pair's vocabularies in each other's tokens: buckets that can be compared, and what may follow inside a token.

A teacher's token is, in the student's words, a sequence of student tokens, and the other way round. Where one side has read
some tokens of such a sequence and the other stands at its beginning, the other's distribution, restricted to tokens that
begin with these, is one over what comes next: the chain rule over a trie of one vocabulary, spelled in tokens of the other.
Phan et al. 2024, arXiv 2410.09303, get next-byte probabilities by the same restriction.
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
JOINED_TOKENS = 2**20
"""Student tokens of the text, at most, that tell which buckets to join."""
OFTEN, TAKEN = 2, 0.3
"""Buckets are joined that part at least so many times, and at so large a share of the times that the rarer of the two comes
next. Others that part are left out where they do: joining all would leave few to tell apart in small vocabularies.
"""
END = -1
"""Stands for a token that ends where another could follow."""
MIN_MASS = 1e-6
"""Probability that all else, and the end of a teacher's token, have at least: float32 tells no less from a sum, and what
ends nowhere in the vocabulary may still be said in another way.
"""
NO_MASS = -68.0
"""A log-probability that stands for none: `divergences.TINY`, rounded to float16, lies below."""


def buckets_of(pair, kd_method):
    """The pair's `vocab.Buckets`, made once: reading two real vocabularies takes seconds, and every leg asks. But for
    `shared_vocab`, those are joined that the two tokenizations of the pair's own text take for each other.
    """
    kind = kd_method if kd_method == "shared_vocab" else "shared_prefix"
    if kind not in pair.buckets:
        if kind == "shared_vocab":
            vocabularies = pair.student_reader.vocabulary, pair.teacher.reader.vocabulary
            pair.buckets[kind] = vocab.tail_buckets(*vocabularies, pair.shared)
        else:
            apart = buckets_apart(pair)
            found, _ = partings(dataset.spread(pair.text, JOINED_TOKENS), apart, spellings_of(pair))
            seen = times_next(dataset.spread(pair.text, JOINED_TOKENS), apart)
            taken = [(a, b) for (a, b), count in found.items() if count >= max(OFTEN, TAKEN * min(seen[a], seen[b]))]
            pair.buckets[kind] = vocab.joined(apart, [each for each in taken if apart.tail not in each])
    return pair.buckets[kind]


def buckets_apart(pair):
    """The pair's `vocab.prefix_buckets`, before any are joined, made once."""
    if "apart" not in pair.buckets:
        ours, theirs = pair.student_reader, pair.teacher.reader
        first = (
            tokenize.first_tokens(ours, theirs.vocabulary.tokens),
            tokenize.first_tokens(theirs, ours.vocabulary.tokens),
        )
        pair.buckets["apart"] = vocab.prefix_buckets(ours.vocabulary, theirs.vocabulary, pair.shared, *first)
    return pair.buckets["apart"]


def spellings_of(pair):
    """`(the teacher's tokens, the student's)`, each in tokens of the other side (`tokenize.spellings`), made once."""
    if "spellings" not in pair.buckets:
        readers = pair.student_reader, pair.teacher.reader
        sides = zip(readers, readers[::-1], strict=True)
        pair.buckets["spellings"] = [tokenize.spellings(reader, other.vocabulary.tokens) for reader, other in sides]
    return pair.buckets["spellings"]


def partings(text, buckets, spellings):
    """`({(bucket, bucket): times}, common boundaries)` of windows: where a teacher and a student that are certain of the
    text, each in its own tokens, would contradict each other. At a common boundary: the next tokens of the two lie in
    different buckets. Inside a token: the text's pieces go on in another bucket than the other side's token is spelled.
    """
    found, total = collections.Counter(), 0
    for window in text:
        ours, theirs = ([getattr(window, f"{side}_{name}") for name in ("labels", "rows", "span_ends")] for side in SIDES)
        total += len(ours[1])
        following = ours[0][ours[1]], theirs[0][theirs[1]]
        told = zip(buckets.student[following[0]], buckets.teacher[following[1]], strict=True)
        found.update((int(a), int(b)) for a, b in told if a != b)
        for (labels, firsts, stops), of, wholes, spelled in (
            (ours, buckets.student, following[1], spellings[0]),
            (theirs, buckets.teacher, following[0], spellings[1]),
        ):
            for i in np.flatnonzero(stops > firsts + 1):
                pieces = zip(spelled[wholes[i]], labels[firsts[i] : stops[i]])  # noqa: B905 - as far as both go
                depth, (a, b) = next(((d, both) for d, both in enumerate(pieces) if both[0] != both[1]), (0, (0, 0)))
                if depth and of[a] != of[b]:
                    found[int(of[a]), int(of[b])] += 1
    return found, total


def times_next(text, buckets):
    """How often each bucket comes next at the common boundaries of windows, by the side that names it more often."""
    counts = np.zeros((2, buckets.num), dtype=np.int64)
    for window in text:
        for side, of in enumerate((buckets.student, buckets.teacher)):
            labels, rows = (getattr(window, f"{SIDES[side]}_{name}") for name in ("labels", "rows"))
            np.add.at(counts[side], of[labels[rows]], 1)
    return counts.max(axis=0)


def tries_of(pair):
    """`(of the teacher's tokens, of the student's)`: each vocabulary's `Trie` in tokens of the other, made once a pair."""
    if "tries" not in pair.buckets:
        buckets, heads = buckets_of(pair, "inside_tokens"), (pair.teacher.head, pair.head)
        sides = zip(spellings_of(pair), ("pieces", "wholes"), (buckets.student, buckets.teacher), heads, strict=True)
        pair.buckets["tries"] = tuple(
            Trie.build(spelled, student, of, buckets.tail, _columns_of(head)) for spelled, student, of, head in sides
        )
    return pair.buckets["tries"]


def _columns_of(head):
    return head.columns if head else lambda ids: ids  # a cached teacher is asked by places, and has none


@dataclasses.dataclass(frozen=True, eq=False)
class Trie:
    """The tokens of one side, the *wholes*, spelled in the other side's, the *pieces*. A node stands for pieces read since
    the beginning of a whole, after which another may follow; nodes are numbered from 1, 0 is none. `student` says which side
    is the student's, `pieces` or `wholes`.

    `keys` `[C]`, ascending, are `node * num_pieces + piece` of a node (or of 0, the beginning) and a piece that leads on,
    `nodes` `[C]` where to. The wholes that begin with a node's pieces are `wholes[firsts[node]:firsts[node + 1]]`, token
    ids, and the same of `columns`, columns of their side's head; `places` says for each which of the node's outcomes follows
    in it, END where it ends here. An outcome is a bucket: `bucket_of` `[pieces]` is the bucket of each piece, and a piece of
    the `tail` counts as an end. A node's are `outcomes[begins[node]:begins[node + 1]]`, and an end where `ends[node]`.

    A student of pieces is to say an outcome or, as often as wholes end, something else: every node has an end. A teacher
    of pieces says the student's wholes in other ways too: a node has an end only where a whole does.
    """

    student: str
    num_pieces: int
    keys: np.ndarray
    nodes: np.ndarray
    firsts: np.ndarray
    wholes: np.ndarray
    columns: np.ndarray
    places: np.ndarray
    begins: np.ndarray
    outcomes: np.ndarray
    ends: np.ndarray
    bucket_of: np.ndarray
    tail: int

    @classmethod
    def build(cls, spellings, student, bucket_of, tail, whole_columns=lambda ids: ids):
        """From `tokenize.spellings`, one for each id of the wholes; `bucket_of` `[pieces]` is the bucket of each piece,
        `tail` the last of them; `whole_columns` makes ids columns of a head (`loading.Head`).
        """
        under, num = {}, 1 + max((max(spelling) for spelling in spellings if spelling), default=0)
        for whole, spelling in enumerate(spellings):
            for depth in range(1, len(spelling) + 1):
                following = int(bucket_of[spelling[depth]]) if depth < len(spelling) else END
                under.setdefault(spelling[:depth], []).append((whole, following))
        under = {read: np.array(pairs).T for read, pairs in under.items()}
        under = {read: pairs for read, pairs in under.items() if (pairs[1] != END).any()}
        for pairs in under.values():
            pairs[1, pairs[1] == tail] = END
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
        wholes, places, outcomes = map(np.concatenate, (wholes, places, outcomes))
        columns = whole_columns(torch.from_numpy(wholes)).numpy()
        return cls(student, num, keys, nodes, firsts, wholes, columns, places, begins, outcomes, ends, bucket_of, tail)

    def agrees(self, nodes, wholes, pieces):
        """Whether at places of these `nodes` `[P]` the text's own tokens fall into one outcome: the whole that the text has
        there, and the piece that follows, ids `[P]` both.
        """
        at, is_whole = _find(self._whole_keys, nodes * self._num_wholes + wholes.clip(max=self._num_wholes - 1))
        buckets = self.bucket_of[pieces]
        place, is_outcome = _find(self._outcome_keys, nodes * self.tail + buckets.clip(max=self.tail - 1))
        place = np.where(is_outcome & (buckets < self.tail), place - self.begins[nodes], END)
        return is_whole & (self.places[at] == place) if len(self.places) else is_whole

    @functools.cached_property
    def _num_wholes(self):
        return 2 + int(self.wholes.max(initial=0))  # one more than there are, which no node has

    @functools.cached_property
    def _whole_keys(self):
        return _owners(self.firsts) * self._num_wholes + self.wholes

    @functools.cached_property
    def _outcome_keys(self):
        return _owners(self.begins) * self.tail + self.outcomes

    def match(self, labels, firsts, stops):
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
        places, fits = _find(self.keys, nodes * self.num_pieces + pieces)
        fits &= (pieces >= 0) & (pieces < self.num_pieces)
        return np.where(fits, self.nodes[places], 0) if len(self.keys) else np.zeros_like(nodes)

    def divergence(self, wholes, pieces, nodes, divergence="forward_kl", temperature=1.0):
        """`T^2 D(teacher || student)` of what comes next at P positions of the pieces' side inside a token of the wholes',
        per position, nats, `[P]`; 0 where the wholes give nothing to any that begins with what was read.

        `wholes` is `(log-probabilities [N, U], rows [P])` of tokens, at the token's beginning, `pieces` the same of buckets
        `[M, B]` at the position itself; rows and `nodes` `[P]` are arrays. The wholes' probabilities, given what was read,
        are summed by outcome; all else that the pieces' side says stands against the wholes that end here, or is left out.
        """
        places = Outcomes.of(self, nodes, wholes[0].device)
        mass, is_said = self._of_wholes(*wholes, places)
        told = self._of_pieces(*pieces, places)
        ours, theirs = (told, mass) if self.student == "pieces" else (mass, told)
        ours, theirs = (places.softened(each, temperature) for each in (ours, theirs))
        values = divergences.tempered_divergence(
            ours[:, None], theirs[:, None], divergence, temperature
        )  # sums over outcomes
        return torch.where(is_said, values.new_zeros(len(nodes)).index_add(0, places.owner, values), 0.0)

    def shortlist(self, log_probs, rows, nodes, k, temperature=1.0):
        """What a teacher says next at P positions, in short: `TopKLogProbs` of its `k` likeliest outcomes, as places among
        those of the node, and a tail. `log_probs` are the teacher's, of tokens or of buckets, `rows` `[P]` and `nodes` `[P]`
        arrays as in `divergence`. A place without an outcome has a probability of `divergences.TINY`, and so has all where
        nothing is said.
        """
        places = Outcomes.of(self, nodes, log_probs.device)
        told, is_said = self._said(log_probs, rows, places, self.student == "wholes")
        told, num = places.softened(told, temperature), places.num_outcomes
        sizes = self.begins[nodes + 1] - self.begins[nodes]
        every = told.new_full((len(nodes), max(k, sizes.max(initial=0))), math.log(divergences.TINY))
        owner = places.owner[:num]
        every[owner, torch.arange(num, device=told.device) - places.starts[owner]] = told[:num]
        kept = every.topk(k, dim=1)
        rest = every.exp().scatter(1, kept.indices, 0.0).sum(dim=1).index_add(0, places.owner[num:], told[num:].exp())
        short = torch.cat([kept.values, (rest + divergences.TINY).log()[:, None]], dim=1)
        return TopKLogProbs(kept.indices, short.where(is_said[:, None], math.log(divergences.TINY)))

    def divergence_from(self, said, log_probs, rows, nodes, divergence="forward_kl", temperature=1.0):
        """`divergence` over the outcomes of a `shortlist`, `said`, and one for all else; `log_probs` are the student's, of
        tokens or of buckets, `rows` `[P]` an array. A teacher's places with nearly no probability are left to the tail.
        """
        places = Outcomes.of(self, nodes, log_probs.device)
        told, is_said = self._said(log_probs, rows, places, self.student == "pieces")
        told = places.softened(told, temperature)
        named = said.log_probs[:, :-1] > NO_MASS
        at = torch.where(named, places.starts[:, None] + said.ids, 0)
        kept = torch.where(named, told[at], math.log(divergences.TINY))
        others = torch.ones_like(told, dtype=torch.bool).index_fill(0, at[named], False)
        rest = told.new_zeros(len(nodes)).index_add(0, places.owner[others], told[others].exp())
        ours = torch.cat([kept, (rest + divergences.TINY).log()[:, None]], dim=1)
        values = divergences.tempered_divergence(ours, said.log_probs, divergence, temperature)
        return torch.where(is_said & (said.log_probs > NO_MASS).any(dim=1), values, 0.0)

    def _said(self, log_probs, rows, places, by_pieces):
        """`(told, is_said)` of one side: what it says of each outcome, and where it says anything."""
        if by_pieces:
            return self._of_pieces(log_probs, rows, places), torch.ones_like(places.starts, dtype=torch.bool)
        return self._of_wholes(log_probs, rows, places)

    def _of_wholes(self, given, rows, places):
        """`(log-probabilities of the outcomes and ends, given what was read; whether the wholes give it anything [P])`."""
        owner, entries = _flat(self.firsts, places.nodes)
        place, behind = self.places[entries], places.num_outcomes + np.cumsum(self.ends[places.nodes]) - 1
        place = np.where(place == END, behind[owner], places.arrays[1][owner] + place)
        row, column, place = _moved((rows[owner], self.columns[entries], place), given.device)
        mass = given.new_zeros(len(places.owner)).index_add(0, place, given[row, column].exp())
        whole = mass.new_zeros(len(places.nodes)).index_add(0, places.owner, mass)
        mass = (mass + divergences.TINY).log() - (whole + divergences.TINY).log()[places.owner]
        if self.student == "pieces":
            mass[places.num_outcomes :].clamp_(min=math.log(MIN_MASS))  # the teacher's: without a gradient
        return mass, whole > divergences.TINY

    def _of_pieces(self, said, rows, places):
        """Log-probabilities of the outcomes and ends, `[F]`."""
        num, owner = places.num_outcomes, places.owner
        row, column = _moved((rows[places.arrays[0][:num]], self.outcomes[places.entries]), said.device)
        told = said[row, column]
        sums = told.new_zeros(len(places.nodes)).index_add(0, owner[:num], told.exp())
        ends = owner[num:]
        told = torch.cat([told, (1.0 - sums[ends]).clamp_min(MIN_MASS).log()])
        if self.student == "wholes":
            told = told - (sums.index_fill(0, ends, 1.0) + divergences.TINY).log()[owner]
        return told


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes:
    """The outcomes of P `nodes`, one behind the other, and behind all of them an end for each node that has one: `owner`
    `[F]` says whose each is, `starts` `[P]` where those of a node begin, `entries` which outcomes of the trie they are;
    arrays, the first two as tensors too.
    """

    nodes: np.ndarray
    entries: np.ndarray
    arrays: tuple
    owner: torch.Tensor
    starts: torch.Tensor

    @property
    def num_outcomes(self):
        return len(self.entries)

    @classmethod
    def of(cls, trie, nodes, device):
        owner, entries = _flat(trie.begins, nodes)
        sizes = trie.begins[nodes + 1] - trie.begins[nodes]
        arrays = np.append(owner, np.flatnonzero(trie.ends[nodes])), np.cumsum(sizes) - sizes
        return cls(nodes, entries, arrays, *_moved(arrays, device))

    def softened(self, logs, temperature):
        """The distributions at a temperature."""
        return (
            logs
            if temperature == 1.0
            else divergences.segment_log_softmax(logs, self.owner, len(self.nodes), temperature)
        )


def _owners(starts):
    """Which node each entry belongs to, of entries that begin at `starts` `[nodes + 1]`."""
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def _find(keys, wanted):
    """`(places, whether it is there)` of each wanted one in ascending `keys`."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return places, keys[places] == wanted


def _moved(arrays, device):
    return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)


def _flat(starts, nodes):
    """`(owner, entries)` of nodes whose entries lie from `starts[node]` up to `starts[node + 1]`, one behind the other."""
    sizes = starts[nodes + 1] - starts[nodes]
    owner = np.repeat(np.arange(len(nodes)), sizes)
    return owner, np.arange(len(owner)) + np.repeat(starts[nodes] + sizes - np.cumsum(sizes), sizes)
