"""What can happen to a process or a device while checkpoints are made, done on purpose.

``python -m tests.faults`` injects all of it and prints what was injected, what fired, and what it
broke.
"""
