"""Research and measurements, one question per file, with the public API only."""
