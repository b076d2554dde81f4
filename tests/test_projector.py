import numpy as np
import torch
from families import byte_level, reader, tiny_model

from kdlib.models.head import Head
from kdlib.models.projector import TeacherToStudentProjector, closed_form


def lstsq(student, teacher):
    """The same problem by numpy's least squares, in float64."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    return np.linalg.lstsq(student - student.mean(0), teacher - teacher.mean(0), rcond=None)[0]


def test_closed_form_is_least_squares_over_the_shared_tokens():
    student, teacher = torch.randn(50, 6), torch.randn(50, 9)
    expected = torch.from_numpy(lstsq(student, teacher))
    torch.testing.assert_close(closed_form(student, teacher), expected, atol=1e-8, rtol=1e-8)


def test_closed_form_of_fewer_tokens_than_dimensions_is_the_least_norm_map():
    student, teacher = torch.randn(4, 6), torch.randn(4, 9)
    expected = torch.from_numpy(lstsq(student, teacher))
    torch.testing.assert_close(closed_form(student, teacher), expected, atol=1e-6, rtol=1e-6)


def test_start_gives_the_teachers_own_probabilities_where_the_head_can_say_them():
    """A student head that is a linear image of the teacher's, plus a constant: projected logits are the teacher's."""
    teacher_head, mix = torch.randn(40, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    student_head = teacher_head @ mix + torch.randn(8, dtype=torch.float64)
    projector = TeacherToStudentProjector(8, 8).double()
    projector.start_from(student_head, teacher_head)
    hidden = torch.randn(5, 8, dtype=torch.float64)
    projected = (projector(hidden) @ student_head.T).softmax(-1)
    torch.testing.assert_close(projected, (hidden @ teacher_head.T).softmax(-1), atol=1e-8, rtol=1e-6)


def test_starts_better_than_noise():
    student_head, teacher_head = torch.randn(200, 12), torch.randn(200, 24)
    teacher_head[:, :12] += 3 * student_head
    hidden = torch.randn(64, 24)
    target = (hidden @ teacher_head.T).log_softmax(-1)
    projector = TeacherToStudentProjector(24, 12)
    projector.start_from(student_head, teacher_head)
    found = (projector(hidden) @ student_head.T).log_softmax(-1)
    noise = (hidden @ (torch.randn(24, 12) / 24**0.5) @ student_head.T).log_softmax(-1)

    def gap(logs):
        return float((target.exp() * (target - logs)).sum(-1).mean().detach())

    assert gap(found) < 0.7 * gap(noise)


def test_decodes_through_the_live_head_with_its_padding_rows_left_out():
    used = reader("byte_level")
    model = tiny_model(used.tokenizer, vocab_size=len(used.tokenizer) + 13)
    head = Head(model, used.vocabulary)
    hidden = torch.randn(3, 16)
    assert head.decode(hidden).shape == (3, len(used.tokenizer))
    before = head.decode(hidden)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2.0)  # tied: the head is the same tensor
    torch.testing.assert_close(head.decode(hidden), 2.0 * before)


def test_a_head_with_gaps_has_a_column_for_every_token_only():
    from kdlib.align import vocab

    tokens = (b"a", None, b"c", b"d", b"e")
    vocabulary = vocab.Vocabulary(tokens, gaps=(1, 3), adds_space=False)
    model = tiny_model(byte_level())
    head = Head(model, vocabulary)
    hidden = torch.randn(2, 16)
    expected = (hidden @ model.get_output_embeddings().weight.T)[:, [0, 2, 4]]
    torch.testing.assert_close(head.decode(hidden), expected)
    assert head.columns(torch.tensor([0, 4, -100, 2])).tolist() == [0, 2, -100, 1]
    assert head.by_column(np.array([10, 11, 12, 13, 14])).tolist() == [10, 12, 14]
