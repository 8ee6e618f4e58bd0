"""Checkpoints that TensorFlow itself has written, and the script that had it write them."""
