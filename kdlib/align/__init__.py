"""Alignment of two tokenizations: common byte boundaries, and vocabularies shared between tokenizers."""
