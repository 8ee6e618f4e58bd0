"""Each block a region in which the expensive operations are saved."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from actckpt.data.graph import Graph
from actckpt.data.plan import Plan, Region, SavedOp
from actckpt.data.profile import Profile
from actckpt.interpreting.regions import place
from actckpt.policies.blocks import blocks

EXPENSIVE = (
    "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._scaled_mm", "aten._grouped_mm",
    "aten.convolution", "aten.mkldnn_rnn_layer", "aten._cudnn_rnn", "aten._thnn_fused_lstm_cell",
    "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "aten.native_dropout", "aten.bernoulli_", "aten.bernoulli", "aten.rand", "aten.randn",
    "aten.rand_like", "aten.randn_like", "aten.normal_", "aten.uniform_", "aten.multinomial",
    "aten.topk", "aten.sort", "aten._fft_c2c", "aten._fft_r2c", "aten._fft_c2r",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Selective:
    """Recomputes all but the operations named in ``saved``.

    Args:
        saved: names of operations, with ("aten.mm.default") or without ("aten.mm") the overload.

    References:
        Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models,
        section 5.
    """

    saved: tuple[str, ...] = EXPENSIVE

    def __call__(self, graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
        """Each block a region, its saved operations listed."""
        regions = (self._region(graph, stage) for stage in blocks(graph))
        # a region that saves all of its results would only hold its input
        return Plan("selective", tuple(r for r in regions if drops_something(graph, r)))

    def _region(self, graph: Graph, stage: int) -> Region:
        s = graph.stages[stage]
        chosen = [i for i in range(s.first, s.last) if self._is_saved(graph.ops[i].name)]
        return Region(s.key, s.key, (), saved_ops(graph, s.first, s.last, frozenset(chosen)))

    def _is_saved(self, name: str) -> bool:
        return name in self.saved or name.rpartition(".")[0] in self.saved


def drops_something(graph: Graph, region: Region) -> bool:
    """Whether anything that autograd saves in a region is recomputed."""
    (placed,) = place(graph, Plan("", (region,)))
    return bool(placed.dropped)


def saved_ops(graph: Graph, first: int, last: int, chosen: frozenset[int]) -> tuple[SavedOp, ...]:
    """How a plan names the operations ``chosen`` among those from ``first`` to ``last``."""
    counts: Counter[tuple[int, str]] = Counter()
    found = []
    for index in range(first, last):
        op = graph.ops[index]
        nth = counts[(op.stage, op.name)]
        counts[(op.stage, op.name)] += 1
        if index in chosen:
            owner = graph.stages[op.stage]
            found.append(SavedOp(owner.path, owner.call, op.name, nth))
    return tuple(found)
