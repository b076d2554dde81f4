"""A teacher on another device than the student's, one batch ahead of it."""

import concurrent.futures
import contextlib

import torch

from kdlib.models import loading
from kdlib.models.teacher import Teacher


class PrefetchingTeacher(Teacher):
    """A live teacher whose work can be begun before it is needed: called like any `Teacher`, with the same result.

    `prefetch` begins a batch in a thread, and the call with that batch and the same wants takes what it came to; any other call
    makes its own. One thread runs the model, one batch at a time. The signal travels through the host's memory: copied from
    card to card, it would make the student's work wait for what the teacher has begun since. What goes wrong in the thread
    is raised by the call.
    """

    def __init__(self, model, reader, student_device):
        super().__init__(model, reader)
        self.student_side_head = self.head.on(student_device)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "teacher")
        self._asked = None

    def prefetch(self, batch, **teacher_request):
        """Begin this batch, best one that is in the host's memory; what was asked for before is forgotten."""
        self.cancel()
        self._asked = self._begun(batch, teacher_request)

    def cancel(self):
        """Let go of what was asked for; what has begun ends by itself."""
        asked, self._asked = self._asked, None
        _drop(asked)

    def __call__(self, batch, taps=loading.Taps(), spans=False, shortlist=None, inner=False):  # noqa: B008 - frozen
        teacher_request = {"taps": taps, "spans": spans, "shortlist": shortlist, "inner": inner}
        device = batch.student_ids.device
        asked, self._asked = self._asked, None  # at once: a training left to the collector may forget at any time
        if asked is None or asked[:2] != (batch.stamp, teacher_request):
            _drop(asked)
            asked = self._begun(batch, teacher_request)
        return asked[2].result().copied(lambda tensor: tensor.to(device, non_blocking=True))

    def _begun(self, batch, teacher_request):
        teacher_request = {"shortlist": None, "inner": False, **teacher_request}
        return batch.stamp, teacher_request, self._thread.submit(self._on_host, batch, **teacher_request)

    def _on_host(self, batch, taps=loading.Taps(), spans=False, shortlist=None, inner=False):  # noqa: B008 - frozen
        """The signal in the host's memory, pinned where it came from a card."""
        device = self.model.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            signal = self.read(batch, taps, spans, shortlist, inner)
            return signal.copied(
                lambda tensor: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
            )


def _drop(asked):
    if asked is not None:
        asked[2].cancel()
