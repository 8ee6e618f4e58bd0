"""The traced training step as plain data: storages, values, operations, saves and stages.

Nothing here knows torch. Positions in time are counted in executed operations: a storage *born* at
``i`` is allocated by ``ops[i]``; one that *died* at ``j`` was free once ``j`` operations had run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from actckpt.data.brief import brief
from actckpt.errors import PlanError

if TYPE_CHECKING:
    import networkx

# Where running statistics stand among the arguments of operations that, in training, move them:
# their schemas do not say so.
STATISTICS = {
    "aten.native_batch_norm.default": (3, 4),
    "aten.cudnn_batch_norm.default": (3, 4),
    "aten.miopen_batch_norm.default": (3, 4),
}
# why a stage is refused that differentiates by `torch.func`, where no saved-tensor hooks may be
TRANSFORMS = "runs a torch.func transform in its forward"


class Category(StrEnum):
    """What a storage is for."""

    PARAMETER = "parameters"
    BUFFER = "buffers"
    GRADIENT = "gradients"
    OPTIMIZER = "optimizer"
    BATCH = "batch"
    CONSTANT = "constants"
    ACTIVATION = "activations"


class Phase(StrEnum):
    """The part of the training step that an operation belongs to."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True)
class Storage:
    """One allocation.

    ``born`` is -1 if it exists before the step. ``died`` ignores autograd's own references: it is
    when the storage would have been freed had nothing been saved for backward. ``settled``: for a
    gradient, how many operations had run when it became a parameter's ``.grad``.
    """

    bytes: int
    category: Category
    born: int
    died: int
    name: str = ""
    settled: int = -1


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor as an operation sees it: a strided window on a storage."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: str
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Op:
    """One ATen operation.

    ``inputs`` and ``outputs`` are value ids, ``writes`` the storages changed in place, ``owner``
    the forward operation that a backward operation belongs to (-1 if none), and ``signature`` the
    index in `Graph.signatures` under which the profile knows its cost. ``plain``: it returns
    tensors only, no lists and no None. ``asked``: Python read a number that it made or wrote
    (``.item()``, a branch), and reads it again when the forward runs again. ``nested``: an autograd
    that the forward runs itself ran it.
    """

    name: str
    stage: int
    phase: Phase
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    writes: tuple[int, ...] = ()
    random: bool = False
    view: bool = False
    owner: int = -1
    signature: int = 0
    plain: bool = True
    asked: bool = False
    nested: bool = False


@dataclass(frozen=True, slots=True)
class Save:
    """One tensor that autograd saved for backward, in the order of saving.

    ``at`` is how many operations had run when it was saved, ``stage`` the innermost stage then,
    ``first_use`` when backward first asked for it (-1: never) and ``released`` when its last
    reference went. ``held`` means that it costs nothing: a parameter, or resident before the step.
    """

    at: int
    value: int
    stage: int
    first_use: int
    released: int
    held: bool


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor argument of a stage.

    ``source`` is ``(stage id, output leaf)`` when the argument *is* (same object, same version)
    what an earlier stage returned; otherwise None.
    """

    storage: int
    requires_grad: bool
    source: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """One call of a module. Operations ``[first, last)`` and saves ``[first_save, last_save)``.

    ``first_call`` and ``last_call`` are how many of `Graph.calls` had been made when it began and
    ended; -1 where a function mode of the model's own, or a torch function, was in between.

    ``refusal`` says why this call cannot be recomputed ("" if it can). ``mutates`` lists the
    arguments' storages that the call changes in place, ``touches`` the (module path, attribute)
    pairs that it rebinds, ``generators`` the Python-side generators that it moves.
    """

    path: str
    call: int
    kind: str
    parent: int
    first: int
    last: int
    first_save: int
    last_save: int
    inputs: tuple[Input, ...] = ()
    outputs: tuple[int, ...] = ()
    refusal: str = ""
    mutates: tuple[int, ...] = ()
    touches: tuple[tuple[str, str], ...] = ()
    generators: tuple[str, ...] = ()
    first_call: int = -1
    last_call: int = -1

    @property
    def key(self) -> tuple[str, int]:
        """(module path, call number): the name under which plans know the stage."""
        return (self.path, self.call)


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """One call of a torch function by the forward, which ran the operations ``[first, last)``.

    Autograd saved ``[first_save, last_save)`` of `Graph.saves` meanwhile.
    ``text`` is its name and arguments as `actckpt.tracing.signature.described` has them. Every
    tensor that a call returns is a *wire*: ``wire`` is the first of its own, ``sources`` are those
    of its tensor arguments (-1: of unknown origin). ``inputs`` and ``outputs`` are value ids (-1:
    none).
    """

    text: str
    sources: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    wire: int
    first: int
    last: int
    first_save: int
    last_save: int


@dataclass(frozen=True)  # without slots: what is derived from it is kept
class Graph:
    """One training step of one model on one batch.

    ``stages[0]`` is the root call, ``calls`` are the torch functions that it called itself, in
    order. ``loss_seen`` and ``optimizer_seen`` say what the step contained;
    ``resident_gradients`` whether gradients existed when it began; ``shaped_by_values`` whether a
    shape follows from values, as of a mask that picks rows. ``supposed`` are the lines that asked
    whether something holds of values that a trace has not. ``stands_for``: the accelerator whose
    operations and sizes these are, where the tensors of ``device`` stood in.
    ``untraced_optimizers``: the number among the step's optimizers, and the reason, of each whose
    step cannot be traced. ``in_backward``: paths of the modules whose forwards the backward ran,
    the outermost ones, in order (reversible nets, checkpoint wrappers of the user's own).
    """

    device: str
    storages: tuple[Storage, ...]
    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    saves: tuple[Save, ...]
    stages: tuple[Stage, ...]
    signatures: tuple[str, ...]
    loss_seen: bool = False
    optimizer_seen: bool = False
    resident_gradients: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    calls: tuple[FunctionCall, ...] = ()
    stands_for: str = ""
    shaped_by_values: bool = False
    supposed: tuple[str, ...] = ()
    untraced_optimizers: tuple[tuple[int, str], ...] = ()
    in_backward: tuple[str, ...] = ()

    __repr__ = brief

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each stage, the ids of the stages that it calls directly, in call order."""
        table: list[list[int]] = [[] for _ in self.stages]
        for i, stage in enumerate(self.stages):
            if stage.parent >= 0:
                table[stage.parent].append(i)
        return tuple(tuple(children) for children in table)

    @cached_property
    def stage_ids(self) -> dict[tuple[str, int], int]:
        """(path, call) -> stage id."""
        return {s.key: i for i, s in enumerate(self.stages)}

    def ancestors(self, stage: int) -> Iterator[int]:
        """``stage`` and every stage that encloses it, innermost first."""
        while stage >= 0:
            yield stage
            stage = self.stages[stage].parent

    @cached_property
    def forward_end(self) -> int:
        """Number of operations that ran before backward began."""
        for index, op in enumerate(self.ops):
            if op.phase in (Phase.BACKWARD, Phase.OPTIMIZER):
                return index
        return len(self.ops)

    def to_networkx(self) -> networkx.DiGraph:
        """The operations and what flows between them, for analyses of your own.

        A node an operation, numbered in the order of execution, with ``name``, ``phase``
        ("forward", "loss", "backward", "optimizer") and ``module`` (its path). An edge leads from
        the operation that made or last changed a storage to each that reads it; ``bytes`` is what
        the storages that flow along it take. Views move no data and are left out. Every edge goes
        forward in time, so the graph is acyclic.

        O(operations + values).
        """
        import networkx

        flow = networkx.DiGraph()
        written: dict[int, int] = {}
        for number, op in enumerate(self.ops):
            if op.view:
                continue
            module = self.stages[op.stage].path if op.stage >= 0 else ""
            flow.add_node(number, name=op.name, phase=str(op.phase), module=module)
            for storage in dict.fromkeys(self.values[value].storage for value in op.inputs):
                before = written.get(storage)
                if before is not None:
                    known = flow.get_edge_data(before, number, {"bytes": 0})["bytes"]
                    flow.add_edge(before, number, bytes=known + self.storages[storage].bytes)
            made = (self.values[value].storage for value in op.outputs)
            written.update((s, number) for s in (*made, *op.writes) if s >= 0)
        return flow

    def _repr_html_(self) -> str:
        """What a notebook shows: how large the step is, and its memory over time."""
        from actckpt.pages.graph import graph_fragment

        return graph_fragment(self)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `Graph.from_json` reads it back equal."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: dict[str, Any] | str) -> Graph:
        """The graph that `to_json` wrote.

        Raises:
            PlanError: the data has other fields than a graph.
        """
        data: dict[str, Any] = json.loads(text) if isinstance(text, str) else text
        try:
            return cls(
                device=data["device"],
                storages=tuple(
                    Storage(**{**s, "category": Category(s["category"])}) for s in data["storages"]
                ),
                values=tuple(
                    Value(**{**v, "shape": tuple(v["shape"]), "stride": tuple(v["stride"])})
                    for v in data["values"]
                ),
                ops=tuple(
                    Op(
                        **{
                            **o,
                            "phase": Phase(o["phase"]),
                            "inputs": tuple(o["inputs"]),
                            "outputs": tuple(o["outputs"]),
                            "writes": tuple(o["writes"]),
                        }
                    )
                    for o in data["ops"]
                ),
                saves=tuple(Save(**s) for s in data["saves"]),
                stages=tuple(_stage_from_json(s) for s in data["stages"]),
                signatures=tuple(data["signatures"]),
                loss_seen=data["loss_seen"],
                optimizer_seen=data["optimizer_seen"],
                resident_gradients=data["resident_gradients"],
                versions=dict(data["versions"]),
                calls=tuple(
                    FunctionCall(
                        **{
                            **c,
                            "sources": tuple(c["sources"]),
                            "inputs": tuple(c["inputs"]),
                            "outputs": tuple(c["outputs"]),
                        }
                    )
                    for c in data["calls"]
                ),
                stands_for=data.get("stands_for", ""),
                shaped_by_values=data.get("shaped_by_values", False),
                supposed=tuple(data.get("supposed", ())),
                untraced_optimizers=tuple(
                    (number, why) for number, why in data.get("untraced_optimizers", ())
                ),
                in_backward=tuple(data.get("in_backward", ())),
            )
        except (KeyError, TypeError) as error:
            raise PlanError(f"not a graph: {error}") from error


def _stage_from_json(data: dict[str, Any]) -> Stage:
    inputs = tuple(
        Input(i["storage"], i["requires_grad"], tuple(i["source"]) if i["source"] else None)
        for i in data["inputs"]
    )
    return Stage(
        **{
            **data,
            "inputs": inputs,
            "outputs": tuple(data["outputs"]),
            "mutates": tuple(data["mutates"]),
            "touches": tuple((path, name) for path, name in data["touches"]),
            "generators": tuple(data["generators"]),
        }
    )
