"""Regions that record in forward and replay in backward, put on a model in place."""
