"""Checkpoints under ckpt-chaos, which kills a training at every file event of its saves."""
