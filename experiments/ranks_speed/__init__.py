"""How long do checkpoints of many ranks take, beside torch.distributed.checkpoint?

Every round runs every arm once on all ranks, in another order each time; what is taken is the time
of the slowest rank. Arms that are there twice say how large the noise is.

    python -W ignore -m experiments.ranks_speed --mib 1024 [--world 4] [--other 2]
"""
