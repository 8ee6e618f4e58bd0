"""Plans made and run on a CUDA device, beside what was predicted."""
