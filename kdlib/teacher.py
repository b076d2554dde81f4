"""The teacher: frozen, on its own device, reading its own ids of the text."""

import dataclasses

import torch

from kdlib import models


@dataclasses.dataclass
class TeacherSignal:
    """What the losses need of the teacher: its last hidden states `[N, Dt]` at the batch's aligned positions."""

    hidden: torch.Tensor


class Teacher:
    """A live teacher. Not an `nn.Module`: nothing that sets a whole model to training, moves or averages it gets here.

    `teacher(batch)` gives the `TeacherSignal` on the batch's device.
    """

    def __init__(self, model, reader):
        self.model = model.eval().requires_grad_(False)
        self.reader = reader
        self.head = models.Head(model, reader.vocabulary)

    def __call__(self, batch):
        device = self.model.device
        with torch.inference_mode():
            hidden = models.last_hidden(self.model, batch.teacher_ids.to(device), batch.teacher_mask.to(device))
            hidden = hidden.flatten(0, 1)[batch.teacher_rows.to(device)]
        # a copy made outside: a tensor born in inference mode can't be saved for the projector's backward
        return TeacherSignal(hidden.clone().to(batch.student_ids.device))
