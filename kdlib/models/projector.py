"""From the teacher's last hidden state to the student's own vocabulary, without the teacher's head."""

import torch
import torch.nn.functional as F


class TeacherToStudentProjector(torch.nn.Module):
    """One matrix from the teacher's width to the student's: `decode(projector(teacher_hidden))` through the student's
    *live* head is the teacher's opinion in the student's vocabulary. `[N, Dt] -> [N, Ds]`.

    Zhang et al. 2024 (DSKD), arXiv 2406.17328, section 3.1, projects the same way; the closed-form start follows from
    asking that both heads give shared tokens the same logits.
    """

    def __init__(self, teacher_width, student_width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(student_width, teacher_width))

    def forward(self, teacher_hidden_ND):
        return F.linear(teacher_hidden_ND.to(self.weight.dtype), self.weight)

    @torch.no_grad()
    def start_from(self, student_rows_SD, teacher_rows_SE):
        """Set the matrix to the closed form over the shared tokens' head rows, student `[S, Ds]` and teacher `[S, Dt]`."""
        self.weight.copy_(closed_form(student_rows_SD, teacher_rows_SE))


def closed_form(student_rows_SD, teacher_rows_SE):
    """The map W `[Ds, Dt]` of least norm that minimises `|| C (student_rows W - teacher_rows) ||` in float64, where C
    takes off the mean over the tokens: adding a constant to all logits of a position changes no probability. Its rank
    is at most Ds.
    """
    student = student_rows_SD.double()
    teacher = teacher_rows_SE.double()
    student = student - student.mean(dim=0)
    teacher = teacher - teacher.mean(dim=0)
    return torch.linalg.pinv(student.T @ student, hermitian=True) @ (student.T @ teacher)


class Standard(torch.nn.Module):
    """Each dimension of some vectors made mean 0 and variance 1 by numbers that are measured once (`measure`) and kept.

    Two dimensions of a residual stream can hold 99 % of its length; standardised by themselves they count as any other.
    Measured on fixed text, not on the batch, so that no position's loss depends on its neighbours.
    """

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    @torch.no_grad()
    def measure(self, vectors_ND):
        wide = vectors_ND.double()
        self.mean.copy_(wide.mean(dim=0))
        self.spread.copy_(wide.std(dim=0, correction=0).clamp_min(1e-6))

    def forward(self, vectors_ND):
        return (vectors_ND.to(self.mean.dtype) - self.mean) / self.spread


class FeatureMap(torch.nn.Module):
    """A learned matrix from the student's standardised features to the teacher's: `[N, Ds], [N, Dt] -> [N, Dt], [N, Dt]`,
    the student's as the map sees them and the teacher's standardised. From student to teacher and never back: a map of the
    teacher could make both sides constant and call it a match. Romero et al. 2015 (FitNets), arXiv 1412.6550, section 2.2.
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
