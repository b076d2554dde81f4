"""kd by the chain rule over both vocabularies: `shared_prefix` where both tokenizations meet, and beyond it a signal at
every position of either side that lies inside a token of the other (`benchmarks.inside`). Whole logits, as rivals have them.
"""

import torch

from benchmarks.inside import divergence, divergence_turned, spelled, trie
from benchmarks.rivals.plug import WholeTeacher
from kdlib import batching, data, inputs, losses, models, parts
from kdlib.projector import FeatureMap

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


class SpelledContrastive(Spelled):
    """The same with kdlib's contrastive part, `contrastive_weight` beside the kd weight."""

    def __init__(self, pair, student, config):
        super().__init__(pair, student, config)
        self.share = config.contrastive_weight / config.kd_weight
        self.beside["contrastive"] = FeatureMap(student.config.hidden_size, pair.teacher.config.hidden_size)
        self.beside["contrastive"].measure(*states_of(pair, student, config.batch_size))

    def kd(self, whole):
        batch, map_of = whole.batch, self.beside["contrastive"]
        ours, theirs = map_of(whole.student_hidden[batch.student_rows], whole.teacher_hidden[batch.teacher_rows])
        windows = zip(ours.split(batch.rows_by_window), theirs.split(batch.rows_by_window), strict=True)
        values = torch.cat([losses.info_nce(a, b, parts.CONTRAST) for a, b in windows])
        return super().kd(whole) + self.share * values.mean()


@torch.no_grad()
def states_of(pair, student, batch_size):
    """Last hidden states of student and teacher at the common boundaries of the pair's sample of windows."""
    found = []
    for i in range(0, len(pair.sample), batch_size):
        batch = batching.collate(pair.sample[i : i + batch_size], *pair.pads)
        ours = models.last_hidden(student, batch.student_ids, batch.student_windows).flatten(0, 1)
        found.append((ours[batch.student_rows], pair.teacher(batch).hidden))
    return [torch.cat(side) for side in zip(*found, strict=True)]


class Remembering(WholeTeacher):
    """A teacher that reads each window once and keeps its last hidden states, in `memory`, `{place: [T, E]}`."""

    def __init__(self, teacher, memory):
        super().__init__(teacher)
        self.memory = memory

    def __call__(self, batch):
        rows, width = batch.teacher_ids.shape
        if not all(place in self.memory for place in batch.places):
            hidden = super().__call__(batch)
            for place, (row, start, stop) in zip(batch.places, batch.teacher_spots, strict=True):
                self.memory[place] = hidden[row * width + start : row * width + stop].clone()
            return hidden
        some = self.memory[batch.places[0]]
        hidden = some.new_zeros(rows * width, some.shape[1])
        for place, (row, start, stop) in zip(batch.places, batch.teacher_spots, strict=True):
            hidden[row * width + start : row * width + stop] = self.memory[place]
        return hidden


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
