"""What was planned and what was measured: as data, as text and as a figure."""
