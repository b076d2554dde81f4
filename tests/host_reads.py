"""Where the host would wait for a GPU, found on a CPU."""

import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdlib


class HostReads(TorchDispatchMode):
    """Records where the host would wait for a GPU: for values, shapes that depend on values, and copies to the host.

    Not counted: `Batch.spans_of`, if the batch has a copy in host memory, a comparison that only a CPU makes, and what
    transformers does inside the student's forward pass.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
    EXEMPT = {"spans_of", "backward", "last_hidden"}  # noqa: RUF012

    def __init__(self, monkeypatch):
        super().__init__()
        self.reads = []
        for name in ("cpu", "numpy", "item", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, self._recording(name, getattr(torch.Tensor, name)))

    def _record(self, name):
        frames = [f for f in traceback.extract_stack() if Path(kdlib.__file__).parent in Path(f.filename).parents]
        frame = frames[-1]
        if not self.EXEMPT & {f.name for f in frames[-2:]}:
            self.reads.append(f"{name} in {frame.name}, {Path(frame.filename).name}:{frame.lineno}")

    def _recording(self, name, method):
        def call(tensor, *args, **kwargs):
            self._record(name)
            return method(tensor, *args, **kwargs)

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        indices = [i for i in (args[1] if name in ("index", "index_put", "index_put_") else ()) if i is not None]
        by_mask = any(i.dtype == torch.bool for i in indices)
        by_count = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if by_mask or by_count or name.startswith(self.WAITS):
            self._record(func.name())
        return func(*args, **(kwargs or {}))
