"""Training of a small GPT without a budget and under two."""
