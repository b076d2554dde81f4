"""A running average of the student's weights."""

from torch.optim.swa_utils import AveragedModel


def decay_at(num_averaged, decay):
    """The decay after so many averaged steps: `(1 + n) / (10 + n)`, at most `decay`. With a plain 0.9999 the weights before
    training would still be 82 % of the average after 2,000 steps.
    """
    return min(decay, (1.0 + num_averaged) / (10.0 + num_averaged))


def average(student, decay):
    """An `AveragedModel` of the student; call its `update_parameters(student)` after every optimizer step. The first call
    copies the weights; buffers are always copied.
    """

    def mix(averaged, now, num_averaged):
        weight = 1.0 - decay_at(int(num_averaged), decay)
        for mean, value in zip(averaged, now, strict=True):
            mean.lerp_(value.to(mean.dtype), weight)

    return AveragedModel(student, multi_avg_fn=mix).requires_grad_(False)
