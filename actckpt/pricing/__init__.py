"""What a plan costs: the one place that predicts."""
