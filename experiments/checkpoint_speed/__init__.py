"""What a checkpoint costs: the stall of training, the time until it is durable, and the way back.

Every round runs every arm once on the same state, in another order each time, for what one deletes
slows the disk for the next; arms that are there twice say how large the noise is. Wall time: it is
mostly waiting for a disk.

    python -m experiments.checkpoint_speed --mib 256 [--alone]

Peers leave threads and processes behind that compete with what is measured after them; ``--alone``
runs none.

Lightning and Orbax are measured where they can be imported:

    pip install lightning orbax-checkpoint jax
"""
