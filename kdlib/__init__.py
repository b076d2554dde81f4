"""Distils a large language model into a small one with a different tokenizer, within Kaggle's session limits."""

import importlib

from kdlib.config import Config

__all__ = [
    "Config", "LivePanel", "Progress", "Run", "align_sentence", "cache_teacher", "demo_config", "diagnose", "distill",
    "kaggle", "plot_runs", "preview", "quiet",
]  # fmt: skip
__version__ = "0.1.0"

_MODULES = {
    "LivePanel": "report.panel", "Progress": "progress", "Run": "report.html", "plot_runs": "report.html",
    "align_sentence": "evaluation.internals", "cache_teacher": "session.cache_writer", "demo_config": "demo",
    "diagnose": "doctor", "distill": "session.session", "preview": "evaluation.preview", "quiet": "cli",
}  # fmt: skip


def __getattr__(name):
    """Loads a public name on first use, so that `import kdlib` does not import torch."""
    if name == "kaggle":
        return importlib.import_module("kdlib.kaggle")
    if name in _MODULES:
        return getattr(importlib.import_module(f"kdlib.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'kdlib' has no attribute {name!r}")
