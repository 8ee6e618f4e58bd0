"""What a plan means on a graph: what runs again, from what, and when."""
