"""The tables that README and docs show, made of what the experiments left in their results."""
