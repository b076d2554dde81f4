"""The training loop: loss terms, objective, optimizer, averaged weights, peak memory."""
