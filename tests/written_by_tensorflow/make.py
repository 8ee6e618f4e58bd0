"""Has TensorFlow save variables in both of its styles: what lies in this folder.

``python tests/written_by_tensorflow/make.py FOLDER``, with tensorflow-cpu 2.21.0, which nothing
else here needs. Beside each checkpoint lies what TensorFlow's own reader says is in it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def objects(tf: Any, prefix: str) -> None:
    """Of every kind of number, by attributes."""
    tf.random.set_seed(3)
    module = tf.Module()
    module.kernel = tf.Variable(tf.random.normal([3, 4]))
    module.bias = tf.Variable(tf.random.normal([4]))
    module.half = tf.Variable(tf.cast(tf.random.normal([5]), tf.bfloat16))
    module.step = tf.Variable(7, dtype=tf.int64)
    module.flag = tf.Variable([True, False])
    module.empty = tf.Variable(tf.zeros([0, 2]))
    tf.train.Checkpoint(model=module).write(prefix)


def named(tf: Any, prefix: str, partitions: int) -> None:
    """By the names of version 1, whose beginnings are stored once."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        for n in range(60):
            v1.get_variable(
                f"bert/encoder/layer_{n}/attention/self/query/kernel",
                [2, 3],
                initializer=v1.random_normal_initializer(seed=n),
            )
        if partitions > 1:
            v1.get_variable(
                "sliced",
                [5, 2],
                partitioner=v1.fixed_size_partitioner(partitions),
                initializer=v1.random_normal_initializer(seed=99),
            )
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, prefix, write_meta_graph=False, write_state=False)


def main(folder: Path) -> None:
    """Every checkpoint."""
    import tensorflow as tf

    objects(tf, str(folder / "object"))
    named(tf, str(folder / "named.ckpt-3"), 1)
    named(tf, str(folder / "partitioned.ckpt"), 2)
    for name in ("object", "named.ckpt-3"):
        reader = tf.train.load_checkpoint(str(folder / name))
        wanted = {}
        for key, dtype in reader.get_variable_to_dtype_map().items():
            if dtype != tf.string:
                values = reader.get_tensor(key)
                raw = bytearray(values.tobytes())
                kind = getattr(torch, dtype.name)
                flat = torch.frombuffer(raw, dtype=kind) if raw else torch.empty(0, dtype=kind)
                wanted[key] = flat.reshape(values.shape).clone()
        save_file(wanted, folder / f"{name}.expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
