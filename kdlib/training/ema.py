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
            if mean.is_floating_point() and mean.data_ptr() != value.data_ptr():
                mean.lerp_(value.to(mean.dtype), weight)

    averaged = AveragedModel(student, multi_avg_fn=update)
    for mean, weight in zip(averaged.module.parameters(), student.parameters(), strict=True):
        if not weight.requires_grad:  # frozen weights beside adapters are shared
            mean.data = weight.data
    return averaged.requires_grad_(False)
