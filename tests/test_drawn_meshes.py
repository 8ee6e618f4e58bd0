"""Whatever ranks hold, however it is cut: saved in one mesh, any other reads the same bits.

``ACTCKPT_FAULTS=whole`` draws 200 meshes; the suite draws a few.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from actckpt.checkpoint.encoding import Encoded, encode
from actckpt.checkpoint.files import Files
from actckpt.checkpoint.reading import read_state
from actckpt.checkpoint.snapshot import Snapshot
from actckpt.checkpoint.verification import read_shares, verify_files
from actckpt.sharded.loading import ShareReading
from tests.test_checkpoint_encoding import same, same_tensor
from tests.threaded_ranks import saved_together

EXAMPLES = 200 if os.environ.get("ACTCKPT_FAULTS") == "whole" else 12
MESHES = ((1,), (2,), (3,), (4,), (5,), (2, 2), (1, 3), (2, 3), (3, 2))
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64,
    torch.complex128,
)  # fmt: skip
# none, empty, fewer rows than ranks, as many, not to be shared evenly
SIZES = (0, 1, 2, 3, 4, 5, 7, 11)


@dataclass(frozen=True)
class World:
    """Ranks in a mesh.

    Args:
        placements: of every tensor, one for each dimension of the mesh; None is a plain tensor.
    """

    mesh: tuple[int, ...]
    placements: tuple[tuple[Placement, ...] | None, ...]

    @property
    def ranks(self) -> range:
        return range(math.prod(self.mesh))

    def part(self, number: int, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """What a rank has of a tensor."""
        placements = self.placements[number]
        if placements is None:
            return whole.clone()
        mesh = DeviceMesh(
            "cpu",
            torch.arange(len(self.ranks)).reshape(self.mesh),
            _init_backend=False,
            _rank=rank,
        )
        shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
        window = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        return DTensor.from_local(
            whole[window].clone(),
            mesh,
            placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )


@st.composite
def worlds(draw: st.DrawFn, wholes: tuple[torch.Tensor, ...]) -> World:
    """Any mesh, and for each tensor any way to cut it that torch has for that mesh."""
    mesh = draw(st.sampled_from(MESHES))

    def cut(whole: torch.Tensor) -> st.SearchStrategy[tuple[Placement, ...] | None]:
        one = st.sampled_from([Replicate(), *(Shard(dim) for dim in range(whole.dim()))])
        several = st.tuples(*[one] * len(mesh))
        return st.none() | several | several | several

    return World(mesh, tuple(draw(cut(whole)) for whole in wholes))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bits, of any dtype and shape."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.sampled_from(SIZES), max_size=3))
    count = math.prod(shape)
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=seeded).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=seeded, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[torch.Tensor, ...], World, World]:
    """Tensors, how they are saved, and how they are read."""
    wholes = tuple(draw(st.lists(tensors(), min_size=1, max_size=5)))
    return wholes, draw(worlds(wholes)), draw(worlds(wholes))


def snapshot_of(world: World, wholes: tuple[torch.Tensor, ...], rank: int) -> Snapshot:
    """What a rank saves: the tensors, the first of them tied, and a stream of its own."""
    parts = {f"t{n}": world.part(n, whole, rank) for n, whole in enumerate(wholes)}
    state = {**parts, "tied": parts["t0"], "plain": {"step": torch.tensor(3.0), "lr": 0.1}}
    own = {"stream": torch.full((5,), rank, dtype=torch.uint8), "rank": rank}
    items: dict[str, Encoded] = {
        "model": encode(state, "model", sharded=True),
        "random": encode(own, "random", sharded=True),
    }
    return Snapshot(1, items, "", {}, "", {})


def local(x: Any) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
@given(cases())
@example(
    (
        (torch.tensor(1.0), torch.empty(0, 2)),
        World((2,), (None, (Shard(1),))),
        World((3,), (None, (Shard(0),))),
    )
)
def test_saved_in_one_mesh_any_other_reads_it(
    case: tuple[tuple[torch.Tensor, ...], World, World],
) -> None:
    wholes, saving, reading = case
    event(f"{len(saving.ranks)} to {len(reading.ranks)}")
    with tempfile.TemporaryDirectory() as folder:
        made = saved_together(
            Path(folder), [snapshot_of(saving, wholes, rank) for rank in saving.ranks]
        )
        files, where = Files(), str(made.path)
        verify_files(files, where)
        _each_byte_once(wholes, read_shares(files, where, made.manifest).tensors(None, where))
        for rank in reading.ranks:
            share = ShareReading(
                files,
                where,
                made.manifest,
                rank=rank,
                like=partial(_like, reading, wholes, rank),
                same_world=saving.mesh == reading.mesh,
            )
            _reads(share.items(), reading, wholes, rank, len(saving.ranks))
        # a process on its own, of which nothing is cut
        state = read_state(files, where)[1]["model"]
        assert all(same_tensor(state[f"t{n}"], whole) for n, whole in enumerate(wholes))


def _each_byte_once(wholes: tuple[torch.Tensor, ...], entries: Any) -> None:
    """What several ranks hold alike, one of them has written."""
    for number, whole in enumerate(wholes):
        chunks = entries[f"model/t{number}"].chunks
        assert sum(math.prod(c.shape) for c in chunks) == whole.numel()
    assert len(entries["model/plain/step"].chunks) == 1


def _like(
    world: World,
    wholes: tuple[torch.Tensor, ...],
    rank: int,
    item: str,
    name: str,
    shape: tuple[int, ...],
) -> Any:
    """The distributed tensor that one is to be cut like."""
    number = name.removeprefix("t")
    if item != "model" or not number.isdigit() or world.placements[int(number)] is None:
        return None
    return world.part(int(number), wholes[int(number)], rank)


def _reads(
    items: dict[str, Any],
    world: World,
    wholes: tuple[torch.Tensor, ...],
    rank: int,
    saved_by: int,
) -> None:
    state = items["model"]
    for number, whole in enumerate(wholes):
        found: Any = state[f"t{number}"]
        expected: Any = world.part(number, whole, rank)
        assert type(found) is type(expected)
        if isinstance(found, DTensor):
            assert found.placements == expected.placements
            assert found.shape == expected.shape
        assert same_tensor(local(found), local(expected)), (rank, number)
    # an empty tensor has no address, by which it could be known
    assert state["tied"] is state["t0"] or not wholes[0].numel()
    assert same(state["plain"], {"step": torch.tensor(3.0), "lr": 0.1})
    whose = rank if rank < saved_by else 0
    assert items["random"]["rank"] == whose
    assert items["random"]["stream"].tolist() == [whose] * 5
