"""Trained adapters between the two models: the projector, feature maps and the layer router."""

import torch
import torch.nn.functional as F

FLOOR = 0.2
"""Share of every mixture that is uniform, so that every layer keeps a weight."""


class TeacherToStudentProjector(torch.nn.Module):
    """A matrix from the teacher's width to the student's, `[N, Dt] -> [N, Ds]`.

    `decode(projector(teacher_hidden))` with the student's *live* head gives teacher logits in the student's vocabulary
    (DSKD, Zhang et al. 2024, arXiv 2406.17328, section 3.1). The closed-form initialisation makes both heads give
    shared tokens the same logits, as nearly as possible.
    """

    def __init__(self, teacher_width, student_width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(student_width, teacher_width))

    def forward(self, teacher_hidden_ND):
        return F.linear(teacher_hidden_ND.to(self.weight.dtype), self.weight)

    @torch.no_grad()
    def start_from(self, student_rows_SD, teacher_rows_SE):
        """Sets the matrix to the closed form over the shared tokens' head rows, student `[S, Ds]` and teacher `[S,
        Dt]`.
        """
        self.weight.copy_(closed_form(student_rows_SD, teacher_rows_SE))


def closed_form(student_rows_SD, teacher_rows_SE):
    """Returns the W `[Ds, Dt]` of least norm that minimises `|| C (student_rows W - teacher_rows) ||`, in float64.

    C subtracts the mean over tokens, because a constant added to all logits of a position changes no probability. The
    rank of W is at most Ds.
    """
    student = student_rows_SD.double()
    teacher = teacher_rows_SE.double()
    student = student - student.mean(dim=0)
    teacher = teacher - teacher.mean(dim=0)
    return torch.linalg.pinv(student.T @ student, hermitian=True) @ (student.T @ teacher)


class Standard(torch.nn.Module):
    """Standardises each dimension to mean 0 and variance 1, with statistics measured once (`measure`).

    Two dimensions of a residual stream can hold 99 % of its norm. The statistics come from fixed text, not from the
    batch, so that no position's loss depends on other positions.
    """

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    @torch.no_grad()
    def measure(self, vectors_ND):
        vectors_ND = vectors_ND.double()
        self.mean.copy_(vectors_ND.mean(dim=0))
        self.std.copy_(vectors_ND.std(dim=0, correction=0).clamp_min(1e-6))

    def forward(self, vectors_ND):
        return (vectors_ND.to(self.mean.dtype) - self.mean) / self.std


class FeatureMap(torch.nn.Module):
    """A learned matrix from the student's standardised features to the teacher's (FitNets, Romero et al. 2015, arXiv
    1412.6550, section 2.2).

    `[N, Ds], [N, Dt] -> [N, Dt], [N, Dt]`: mapped student features and standardised teacher features. The teacher's
    features are not mapped: a learned map of both sides could collapse to a constant.
    """

    def __init__(self, student_width, teacher_width):
        super().__init__()
        self.student = Standard(student_width)
        self.teacher = Standard(teacher_width)
        self.weight = torch.nn.Parameter(torch.empty(teacher_width, student_width))
        torch.nn.init.orthogonal_(self.weight)

    def measure(self, student_ND, teacher_NE):
        self.student.measure(student_ND)
        self.teacher.measure(teacher_NE)

    def forward(self, student_ND, teacher_NE):
        return F.linear(self.student(student_ND), self.weight), self.teacher(teacher_NE)


class LayerRouter(torch.nn.Module):
    """A gate on the student's state that mixes K tapped teacher layers per position.

    `(student [N, Ds], layers K x [N, Dt])` gives the mapped student features `[N, Dt]`, the mixture of the layers'
    standardised features `[N, Dt]`, and the weights `[N, K]`. The weights are `0.2 / K + 0.8 softmax`, so that their
    entropy cannot fall below that of one layer at 0.8 + 0.2 / K (0.59 of 1.39 nats for four layers). The gate reads the
    state without gradient: the student must match a layer, not choose an easier one.
    """

    def __init__(self, student_width, teacher_width, num_layers):
        super().__init__()
        self.map = FeatureMap(student_width, teacher_width)
        self.layers = torch.nn.ModuleList(Standard(teacher_width) for _ in range(num_layers))
        self.gate = torch.nn.Parameter(torch.zeros(num_layers, student_width))

    def measure(self, student_ND, layers):
        self.map.student.measure(student_ND)
        for standard, vectors in zip(self.layers, layers, strict=True):
            standard.measure(vectors)

    def forward(self, student_ND, layers):
        state = self.map.student(student_ND)
        gate = F.linear(state.detach(), self.gate).softmax(dim=-1)
        weights = FLOOR / len(layers) + (1.0 - FLOOR) * gate
        targets = torch.stack([standard(vectors) for standard, vectors in zip(self.layers, layers, strict=True)], dim=1)
        target = (weights.unsqueeze(-1) * targets).sum(dim=1)
        return F.linear(state, self.map.weight), target, weights
