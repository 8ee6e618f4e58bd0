"""Checkpoints that many ranks write together, and read back in any number."""
