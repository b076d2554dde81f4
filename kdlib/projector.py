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
