"""A signal for the student's positions that lie inside a teacher's token: what the teacher said where the token began, given
the part of it that the student has read since.

At a boundary that both tokenizations share the teacher names tokens of its own; each of them is, in the student's words, a
sequence of student tokens. `shared_prefix` compares the first of these and leaves the others alone. Here the second is
compared at the student's next position, among the teacher tokens that begin with the first, and so on: the chain rule over a
trie of the teacher's vocabulary, spelled in student tokens. A teacher token that is read to its end says nothing of what
follows: it counts as any other student token. (Restricting a token distribution to what agrees with the bytes read so far is
also how Phan et al. 2024, arXiv 2410.09303, get byte-level probabilities.)
"""

import dataclasses

import numpy as np
import torch

from kdlib import losses, parts

NOT_READ = -1
LEAST = 1e-6
"""Probability below which the student's side counts as this."""


def spelled(reader, byte_strings):
    """For each byte string the student tokens that it is in the middle of a text, as a tuple; () for None, for bytes that
    are no whole characters, and where the tokenizer makes other bytes of it.
    """
    asked, texts = [], []
    for index, token in enumerate(byte_strings):
        try:
            if token:
                texts.append("\n" + token.decode())
                asked.append(index)
        except UnicodeDecodeError:
            continue
    found = [()] * len(byte_strings)
    coded = reader.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    tokens = reader.vocabulary.tokens
    for index, ids in zip(asked, coded, strict=True):
        said = [tokens[i] or b"" for i in ids]
        for start in range(1, min(3, len(ids)) + 1):  # the line break, with or without a space that the tokenizer adds
            if b"".join(said[start:]) == byte_strings[index] and b"".join(said[:start]).strip(b" ") == b"\n":
                found[index] = tuple(ids[start:])
                break
    return found


@dataclasses.dataclass(frozen=True)
class Node:
    """What may follow some student tokens inside a teacher's token: `columns` `[K]` of the teacher's logits, for each
    of them the place of its next student token in `following` `[G]`, or G where it ends here.
    """

    columns: np.ndarray
    places: np.ndarray
    following: np.ndarray


def trie(spellings):
    """`{student tokens read since the boundary: Node}` of the teacher's tokens, given by column as tuples of student ids.
    Nodes after which nothing can follow are left out.
    """
    under = {}
    for column, spelling in enumerate(spellings):
        for depth in range(1, len(spelling) + 1):
            following = spelling[depth] if depth < len(spelling) else NOT_READ
            under.setdefault(spelling[:depth], []).append((column, following))
    nodes = {}
    for read, entries in under.items():
        columns, following = np.array(entries, dtype=np.int64).T
        names = np.unique(following[following != NOT_READ])
        if len(names):
            places = np.where(following == NOT_READ, len(names), np.searchsorted(names, following))
            nodes[read] = Node(columns, places, names)
    return nodes


def divergence(student_NV, teacher_MU, nodes, teacher_rows):
    """KL(teacher || student) per position, nats, `[N]`: over the tokens that may follow inside the teacher's token and one
    tail for all others. `student_NV` are log-probabilities, `teacher_MU` probabilities at the boundaries, `teacher_rows[i]`
    the one of position i and `nodes[i]` its `Node`. Positions where the teacher gives nothing to any of them count 0.
    """
    mass, whole, owner, ids, is_tail = _restricted(teacher_MU, nodes, teacher_rows)
    target = mass / whole.clamp_min(losses.EMPTY)[owner]
    told = student_NV[owner, ids].masked_fill(is_tail, -torch.inf)
    rest = 1.0 - told.new_zeros(len(nodes)).index_add(0, owner, told.exp())
    ours = torch.where(is_tail, rest.clamp_min(LEAST).log()[owner], told)
    values = target.new_zeros(len(nodes)).index_add(0, owner, torch.special.xlogy(target, target) - target * ours)
    return torch.where(whole > losses.EMPTY, values, 0.0)


def divergence_turned(student_MV, teacher_NU, nodes, student_rows):
    """The same where the teacher's position lies inside a *student's* token: `nodes` are of a trie of the student's
    vocabulary in teacher tokens. KL(teacher || student) per position, nats, `[N]`, of what the teacher says comes next,
    `teacher_NU` log-probabilities, and what the student's distribution at the boundary, `student_MV` probabilities, says of
    it among the student tokens that begin with what was read since. The teacher's tail stands against the student tokens
    that end here; where there are none it is left out.
    """
    mass, whole, owner, ids, is_tail = _restricted(student_MV, nodes, student_rows)
    told = teacher_NU[owner, ids].exp().masked_fill(is_tail, 0.0)
    rest = (1.0 - told.new_zeros(len(nodes)).index_add(0, owner, told)).clamp_min(0.0)
    ends = torch.tensor([bool((node.places == len(node.following)).any()) for node in nodes], device=told.device)
    target = torch.where(is_tail, (rest * ends)[owner], told)
    target = target / target.new_zeros(len(nodes)).index_add(0, owner, target).clamp_min(losses.EMPTY)[owner]
    ours = (mass / whole.clamp_min(losses.EMPTY)[owner]).clamp_min(LEAST).log()
    return target.new_zeros(len(nodes)).index_add(0, owner, torch.special.xlogy(target, target) - target * ours)


def _restricted(probabilities, nodes, rows):
    """What the `nodes` make of the rows of `probabilities`, flat, G + 1 entries a node, the last one for what ends there:
    `(mass, whole by node, which node, token id, whether it is that last one)`.
    """
    device, num = probabilities.device, len(nodes)
    sizes = np.array([len(node.following) + 1 for node in nodes])
    stops = np.cumsum(sizes)
    counts = [len(node.columns) for node in nodes]
    entry_places = np.concatenate([node.places + start for node, start in zip(nodes, stops - sizes, strict=True)])
    entry_columns = np.concatenate([node.columns for node in nodes])
    ids = np.concatenate([np.append(node.following, 0) for node in nodes])
    found = [
        np.repeat(np.asarray(rows), counts),
        entry_columns,
        entry_places,
        np.repeat(np.arange(num), sizes),
        ids,
        stops - 1,
    ]
    row, column, place, owner, ids, tails = (torch.from_numpy(each).to(device) for each in found)
    mass = probabilities.new_zeros(len(owner)).index_add(0, place, probabilities[row, column])
    is_tail = torch.zeros(len(owner), dtype=torch.bool, device=device)
    is_tail[tails] = True
    return mass, mass.new_zeros(num).index_add(0, owner, mass), owner, ids, is_tail


class Inside:
    """The part: `values(objective, rows)` `[n]` for `parts.Part`, 0 at positions that are in no teacher token's inside."""

    def __init__(self, pair):
        head = pair.teacher.head
        tokens = pair.teacher.reader.vocabulary.tokens
        kept = range(head.num_rows) if head.kept is None else head.kept.tolist()
        self.nodes = trie(spelled(pair.student_reader, [tokens[i] for i in kept]))

    def places(self, rows):
        """`(positions, teacher rows, nodes)` of a block's positions inside a teacher's token."""
        labels, span_of = rows.labels.numpy(), rows.span_of.numpy()
        found, read, last, before = ([], [], []), (), -1, -1
        order = np.argsort(
            span_of, kind="stable"
        )  # a span's rows lie in the order of the text, its first one among them
        for position in order[np.searchsorted(span_of[order], 0) :]:
            span = span_of[position]
            read = (*read, labels[before]) if span == last else ()
            before, last = position, span
            node = self.nodes.get(read)
            if node is not None:
                for values, value in zip(found, (position, span, node), strict=True):
                    values.append(value)
        return found

    def values(self, objective, rows):
        positions, spans, nodes = self.places(rows)
        values = rows.logits.new_zeros(len(rows.logits))
        if not positions:
            return values
        where = torch.tensor(positions)
        teacher = losses.log_probs(rows.other).exp()
        return values.index_add(0, where, divergence(rows.log_probs()[where], teacher, nodes, spans))

    def part(self):
        return parts.Part(self.values, "aligned")
