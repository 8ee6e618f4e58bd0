"""Checkpoints that other libraries have written, read without running any of what they name."""
