"""Distil a large language model into a small one that has another tokenizer, inside Kaggle's session limits."""

__version__ = "0.1.0"
