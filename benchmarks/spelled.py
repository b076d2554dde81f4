"""kd by the chain rule over both vocabularies: `shared_prefix` where both tokenizations meet, and beyond it a signal at
every position of either side that lies inside a token of the other (`benchmarks.inside`). Whole logits, as rivals have them.
"""

import torch

from benchmarks.inside import divergence, divergence_turned, spelled, trie
from kdlib import data, inputs, losses, models

FIRST = "shared_prefix"


class Spelled:
    """Plugged in as a rival is (`rivals.plug`). `turned`: with the teacher's positions inside the student's tokens too."""

    turned = True

    def __init__(self, pair, student, config):
        self.beside = torch.nn.ModuleDict()
        self.teacher_head, head = pair.teacher.head, models.Head(student, pair.student_reader.vocabulary)
        buckets = inputs.buckets_of(pair, FIRST)
        self.num_buckets = buckets.num
        self.buckets = head.by_column(buckets.student), self.teacher_head.by_column(buckets.teacher)
        if "spelled" not in pair.buckets:
            readers = pair.student_reader, pair.teacher.reader
            tries = [trie(spelled(a, b.vocabulary.tokens)) for a, b in (readers, readers[::-1])]
            pair.buckets["spelled"] = tries
        self.of_teacher, self.of_student = pair.buckets["spelled"]

    def kd(self, whole):
        """The mean over common boundaries of the sum of all that is said from one to the next, nats."""
        batch = whole.batch
        student = losses.log_probs(whole.student_logits)
        teacher = losses.log_probs(self.teacher_head.decode(whole.teacher_hidden))
        rows = batch.student_rows, batch.teacher_rows
        ours, theirs = (
            losses.bucket_log_probs(side[at], bucket, self.num_buckets)
            for side, at, bucket in zip((student, teacher), rows, self.buckets, strict=True)
        )
        total = losses.forward_kl(ours, theirs).sum()
        spans = batch.student_rows, batch.student_stops, batch.labels, batch.teacher_rows
        positions, anchors, nodes = inside(*spans, self.of_teacher)
        if positions:
            total = total + divergence(student[positions], teacher.exp(), nodes, anchors).sum()
        if self.turned:
            spans = batch.teacher_rows, batch.teacher_stops, batch.teacher_labels, batch.student_rows
            positions, anchors, nodes = inside(*spans, self.of_student)
            if positions:
                total = total + divergence_turned(student.exp(), teacher[positions], nodes, anchors).sum()
        return total / max(1, len(ours))


def inside(firsts, stops, labels, others, nodes):
    """`(positions, anchors, nodes)`: the flat positions of one side, between a common boundary and the next, after which
    something may follow inside a token of the other side; the other side's position `others` at that boundary; the `Node`.
    """
    labels, found = labels.flatten().tolist(), ([], [], [])
    for first, stop, other in zip(firsts.tolist(), stops.tolist(), others.tolist(), strict=True):
        for position in range(first + 1, stop):
            read = tuple(labels[first:position])
            if data.IGNORE in read or read not in nodes:
                break
            for values, value in zip(found, (position, other, nodes[read]), strict=True):
                values.append(value)
    return found
