"""Models and what is attached to them: loading, devices, projector, the teacher and its cache."""
