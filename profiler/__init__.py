"""What a training step costs: allocator truth, live storages, operation timing, roofline."""
