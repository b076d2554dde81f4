"""The loss formulas, as functions of plain tensors."""
