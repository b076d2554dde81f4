"""What a model knows of held-out text, what it kept of its teacher, and the verdict."""
