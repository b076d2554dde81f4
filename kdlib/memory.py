"""Memory of CPU and GPU: usage, allocation tracking, gradient checkpointing and recovery from out-of-memory errors."""

import contextlib
import functools
import gc
import math
import weakref

import accelerate
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

GUESSED_BYTES = 2**30
"""Free memory assumed for a device that does not report it."""


def usage(device):
    """Returns `{"used_bytes", "total_bytes"}`; None and infinity if unknown. CPU usage is that of this process."""
    if torch.device(device).type == "cuda":
        free, total = _query(lambda: torch.cuda.mem_get_info(device), (None, math.inf))
        return {"used_bytes": None if free is None else total - free, "total_bytes": total}
    used = _query(lambda: psutil.Process().memory_info().rss, None)
    return {"used_bytes": used, "total_bytes": _query(lambda: psutil.virtual_memory().total, math.inf)}


def free(device):
    """Returns the bytes that can still be allocated on a device."""
    if torch.device(device).type == "cuda":
        cached = _query(lambda: torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), 0)
        return _query(lambda: torch.cuda.mem_get_info(device)[0], GUESSED_BYTES) + cached
    return _query(lambda: psutil.virtual_memory().available, GUESSED_BYTES)


def _query(function, default):
    try:
        return function()
    except Exception:  # noqa: BLE001 - a run must not fail because the system reports no memory
        return default


class AllocationTracker(TorchDispatchMode):
    """Tracks the bytes of live tensors that are allocated on `device` inside the context; each storage counts once.

    `current`: live bytes. `peak`: maximum since `mark`. `other`: other bytes in use on the device near that peak.
    """

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)
        self.current = self.peak = self.other = 0
        self.queried_at = 0  # live bytes at the last query of the device
        self.storages = {}

    def mark(self):
        """Returns `(peak, other)` since the last mark and resets the peak."""
        peak, self.peak, self.queried_at = self.peak, self.current, 0
        return peak, self.other

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # operations are not decomposed there; count their intermediates too
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        for tensor in _tensors((args, kwargs.values())):
            self._register(tensor, 0)
        output = func(*args, **kwargs)
        for tensor in _tensors((output,)):
            self._register(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.current)
        if self.current > 1.05 * self.queried_at:
            self.queried_at, self.other = self.current, (usage(self.device)["used_bytes"] or 0) - self.current
        return output

    def _register(self, tensor, size):
        storage = tensor.untyped_storage()
        if id(storage) not in self.storages and tensor.device.type == self.device.type:
            self.storages[id(storage)] = weakref.ref(storage, functools.partial(self._release, id(storage), size))
            self.current += size

    def _release(self, key, size, _):
        del self.storages[key]
        self.current -= size


def _tensors(nested):
    for leaf in nested:
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, (tuple, list)) or type(leaf).__name__ == "dict_values":
            yield from _tensors(leaf)


def can_recompute(model):
    """Whether a model supports gradient checkpointing."""
    try:
        with gradient_checkpointing_enabled(model):
            return True
    except ValueError:
        return False


@contextlib.contextmanager
def gradient_checkpointing_enabled(model, on=True):
    """Enables gradient checkpointing of a model inside the block (Chen et al. 2016, arXiv 1604.06174).

    Loss and gradients stay the same; memory shrinks at the cost of one more forward pass. Raises ValueError if the
    model does not support it.
    """
    if not on:
        yield
        return
    newer = hasattr(model, "activation_checkpointing_enable")  # the older name warns if the newer one exists
    name = "activation_checkpointing" if newer else "gradient_checkpointing"
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    model.disable_input_require_grads()  # needed for frozen embeddings only
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()


def is_out_of_memory(error):
    """Whether an exception reports that a GPU or the host ran out of memory."""
    is_memory_error = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_memory_error or accelerate.utils.memory.should_reduce_batch_size(error)


def retry_with_smaller_batch(work, size):
    """Returns `(work(size), size)`, halving `size` down to 1 while memory runs out."""
    while True:
        try:
            return work(size), size
        except Exception as error:
            if not is_out_of_memory(error) or size == 1:
                raise
        size = (size + 1) // 2
        release_memory()


def release_memory():
    """Frees unreferenced memory and the GPU allocator's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
