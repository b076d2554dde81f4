"""Exponential moving average of the student's weights."""

from torch.optim.swa_utils import AveragedModel


def decay_at(num_averaged, decay):
    """Returns the decay after some averaged steps: `(1 + n) / (10 + n)`, at most `decay`. With a constant 0.9999, the
    initial weights would still be 82 % of the average after 2,000 steps.
    """
    return min(decay, (1.0 + num_averaged) / (10.0 + num_averaged))


def average(student, decay):
    """Returns an `AveragedModel` of the student. Call its `update_parameters(student)` after every optimizer step: the
    first call copies the weights. Buffers are always copied.
    """

    def update(averages, values, num_averaged):
        weight = 1.0 - decay_at(int(num_averaged), decay)
        for mean, value in zip(averages, values, strict=True):
            mean.lerp_(value.to(mean.dtype), weight)

    return AveragedModel(student, multi_avg_fn=update).requires_grad_(False)
