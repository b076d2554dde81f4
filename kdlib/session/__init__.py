"""One session of a run: inputs, time budget, checkpoints, resume, copies, the end."""
