"""Data pipeline from files to batches: documents, conversations, token ids, windows, padded batches."""
