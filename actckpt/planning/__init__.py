"""The search for a plan that was seen to fit."""
