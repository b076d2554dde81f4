"""How much memory is in use, how much there is, and what to do when there was too little. No question about it raises."""

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
"""Free memory of a device that does not tell."""


def usage(device):
    """`{"used_bytes", "total_bytes"}` of a device: all of the card's for CUDA, this process's and the host's for a CPU. None
    in use and an infinite total where the system does not tell.
    """
    if torch.device(device).type == "cuda":
        free, total = _told(lambda: torch.cuda.mem_get_info(device), (None, math.inf))
        return {"used_bytes": None if free is None else total - free, "total_bytes": total}
    used = _told(lambda: psutil.Process().memory_info().rss, None)
    return {"used_bytes": used, "total_bytes": _told(lambda: psutil.virtual_memory().total, math.inf)}


def free(device):
    """Bytes that can still be allocated on a device."""
    if torch.device(device).type == "cuda":
        kept = _told(lambda: torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), 0)
        return _told(lambda: torch.cuda.mem_get_info(device)[0], GUESSED_BYTES) + kept
    return _told(lambda: psutil.virtual_memory().available, GUESSED_BYTES)


def _told(ask, otherwise):
    """What a question about the machine gives, or a value where it fails, however that is."""
    try:
        return ask()
    except Exception:  # noqa: BLE001 - a run must not end with a file of the system that can't be read
        return otherwise


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of all tensors that are made on `device` while it is on and are still there: `now`, and `most`, the
    most since `mark`; `beside`: what is in use of the device besides, near that point. Tensors that were there before count
    nothing; a storage counts once.
    """

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)
        self.now = self.most = self.asked = self.beside = 0
        self.known = {}

    def mark(self):
        """`(most, beside)` since the last mark; from here on it is counted anew."""
        found = self.most, self.beside
        self.most, self.asked = self.now, 0
        return found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # there an operation comes whole: what it is made of counts, too
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        for tensor in _tensors((args, kwargs.values())):
            self._see(tensor, 0)
        made = func(*args, **kwargs)
        for tensor in _tensors((made,)):
            self._see(tensor, tensor.untyped_storage().nbytes())
        self.most = max(self.most, self.now)
        if self.now > 1.05 * self.asked:
            self.asked, self.beside = self.now, (usage(self.device)["used_bytes"] or 0) - self.now
        return made

    def _see(self, tensor, size):
        storage = tensor.untyped_storage()
        if id(storage) not in self.known and tensor.device.type == self.device.type:
            self.known[id(storage)] = weakref.ref(storage, functools.partial(self._gone, id(storage), size))
            self.now += size

    def _gone(self, key, size, _):
        del self.known[key]
        self.now -= size


def _tensors(nested):
    for leaf in nested:
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, (tuple, list)) or type(leaf).__name__ == "dict_values":
            yield from _tensors(leaf)


def can_recompute(model):
    """Whether transformers can make a model's layers a second time (`gradient_checkpointing_enabled`)."""
    try:
        with gradient_checkpointing_enabled(model):
            return True
    except ValueError:
        return False


@contextlib.contextmanager
def gradient_checkpointing_enabled(model, on=True):
    """Inside, a model in training keeps only what each layer is given, and makes the rest anew in the backward pass
    (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174): the same loss and gradients from less memory, at the cost
    of one more forward pass. Afterwards nothing of it is left on the model. ValueError where it has no support for it.
    """
    if not on:
        yield
        return
    newer = hasattr(model, "activation_checkpointing_enable")  # where it is, the older name warns
    name = "activation_checkpointing" if newer else "gradient_checkpointing"
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    model.disable_input_require_grads()  # only frozen embeddings would need it
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()


def is_out_of_memory(error):
    """Whether an exception says that there was no memory left, on a card or in the host."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or accelerate.utils.memory.should_reduce_batch_size(error)


def retry_with_smaller_batch(work, size):
    """`(work(size), size)`, where memory runs out with a half of `size`, and so on down to 1."""
    while True:
        try:
            return work(size), size
        except Exception as error:
            if not is_out_of_memory(error) or size == 1:
                raise
        size = (size + 1) // 2
        release_memory()


def release_memory():
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
