"""Weights written for other programs: one table of them, one module for each format."""
