"""One optimized model in the loop that trains it: its plans by batch, and all that is watched."""
