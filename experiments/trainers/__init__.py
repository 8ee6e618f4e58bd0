"""Trainers that people use, under a budget, killed and resumed: see `__main__`."""
