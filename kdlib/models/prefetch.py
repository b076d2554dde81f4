"""A teacher on another device than the student's that computes one batch ahead."""

import concurrent.futures
import contextlib

import torch

from kdlib.models import forward
from kdlib.models.teacher import Teacher


class PrefetchingTeacher(Teacher):
    """A live teacher that can compute a batch before it is needed, with the same results as `Teacher`.

    `prefetch` starts a batch in a thread. A call with the same batch and request returns its result; any other call
    starts its own. One thread runs the model, one batch at a time. The signal is copied through host memory: a copy
    between GPUs would make the student wait for work that the teacher started later. Errors in the thread are raised by
    the call.
    """

    def __init__(self, model, reader, student_device):
        super().__init__(model, reader)
        self.student_side_head = self.head.on(student_device)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "teacher")
        self._pending = None

    def prefetch(self, batch, **request):
        """Starts this batch, preferably one in host memory, and discards the previous one."""
        self.cancel()
        self._pending = self._submit(batch, request)

    def cancel(self):
        """Discards the prefetched batch; a running computation ends by itself."""
        pending, self._pending = self._pending, None
        _cancel(pending)

    def __call__(self, batch, taps=forward.Taps(), spans=False, shortlist=None, inner=False):  # noqa: B008 - frozen
        request = {"taps": taps, "spans": spans, "shortlist": shortlist, "inner": inner}
        device = batch.student_ids.device
        pending, self._pending = self._pending, None  # at once: a collected TrainLoop may cancel at any time
        if pending is None or pending[:2] != (batch.batch_id, request):
            _cancel(pending)
            pending = self._submit(batch, request)
        return pending[2].result().map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def _submit(self, batch, request):
        request = {"shortlist": None, "inner": False, **request}
        return batch.batch_id, request, self._thread.submit(self._read_to_host, batch, **request)

    def _read_to_host(self, batch, taps, spans=False, shortlist=None, inner=False):
        """Returns the signal in host memory, pinned if it comes from a GPU."""
        device = self.model.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            signal = self.read(batch, taps, spans, shortlist, inner)
            return signal.map_tensors(
                lambda tensor: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
            )


def _cancel(pending):
    if pending is not None:
        pending[2].cancel()
