"""What the stages hand on as plain data: graph, profile, plan."""
