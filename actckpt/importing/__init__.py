"""Weights from anywhere into a model: all that was asked for, or nothing."""
