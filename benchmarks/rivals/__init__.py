"""Published ways to distil across tokenizers, written from their papers, to be set against kdlib on the same harness."""
