"""Models of the suite that no library has; each file is one model."""
