"""A training run and its checkpoints: what is saved of it, when, and how it is put back."""
