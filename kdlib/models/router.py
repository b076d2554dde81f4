"""Which of the teacher's layers a position should listen to: the student decides."""

import torch
import torch.nn.functional as F

from kdlib.models.projector import FeatureMap, Standard

FLOOR = 0.2
"""Share of every mixture that is spread evenly, so that no layer is ever shut out."""


class LayerRouter(torch.nn.Module):
    """From the student's state at a position a softmax over K tapped teacher layers; the target is that mixture of the
    layers' standardised features: `(student [N, Ds], layers K x [N, Dt])` gives mapped `[N, Dt]`, target `[N, Dt]`, weights
    `[N, K]`.

    The weights are `0.2 / K + 0.8 softmax`: their entropy can't fall below that of one layer at 0.8 + 0.2 / K (0.59 of 1.39
    nats for four layers), whatever the gate learns. The gate reads the student's state without gradient: the student must
    match a layer, not ask for an easier one.
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
        free = F.linear(state.detach(), self.gate).softmax(dim=-1)
        weights = FLOOR / len(layers) + (1.0 - FLOOR) * free
        told = torch.stack([standard(vectors) for standard, vectors in zip(self.layers, layers, strict=True)], dim=1)
        target = (weights.unsqueeze(-1) * told).sum(dim=1)
        return F.linear(state, self.map.weight), target, weights
