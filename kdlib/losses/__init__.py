"""The mathematics of the loss terms, on plain tensors."""
