"""Figures, the live panel and the page of a run; nothing here imports torch."""
