"""Checkpoints and plans as commit 573e56b wrote them, which every later tree must resume."""
