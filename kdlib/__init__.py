"""Distil a large language model into a small one that has another tokenizer, inside Kaggle's session limits."""

import importlib

from kdlib.config import Config

__all__ = ["Config", "distill"]
__version__ = "0.1.0"


def __getattr__(name):
    """`kdlib.distill`, without making `import kdlib` wait for torch."""
    if name == "distill":
        return importlib.import_module("kdlib.session.session").distill
    raise AttributeError(f"module 'kdlib' has no attribute {name!r}")
