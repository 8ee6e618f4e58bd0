"""The longest chain of blocks as numbers; a schedule of it as regions in regions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise

import numpy as np

from actckpt.data.graph import Category
from actckpt.data.plan import Region
from actckpt.interpreting.regions import is_linked
from actckpt.policies.blocks import blocks, chains, region
from actckpt.policies.solver.chain import Chain, Kept, Schedule, Way
from actckpt.policies.solver.chain_levels import ChainLevels
from actckpt.pricing.simulate import Pricer

_HELD = (Category.PARAMETER, Category.BUFFER)


class BlockChain:
    """Whole blocks: of each everything that backward needs is kept, or nothing.

    What several blocks read and none of them makes is taken to stay until backward has passed the
    last of them.

    Attributes:
        blocks: ids of the stages of each; what saves nothing belongs to the block behind it.
    """

    leaves_out_little = False  # what regions keep beside, such as generators' states

    def __init__(self, pricer: Pricer) -> None:
        self.pricer = pricer
        self.graph = pricer.graph
        self.blocks: list[list[int]] = []
        waiting: list[int] = []
        for stage in self._row():
            waiting.append(stage)
            if self._saves(waiting):
                self.blocks.append(waiting)
                waiting = []
        if self.blocks:
            self.blocks[-1] += waiting

    @cached_property
    def chain(self) -> Chain | None:
        """The numbers; None where there are no two blocks, or backward passes them otherwise."""
        graph, pricer, count = self.graph, self.pricer, len(self.blocks)
        saves = [self._saves(block) for block in self.blocks]
        entered = [min(graph.saves[k].first_use for k in of_block) for of_block in saves]
        if count < 2 or any(later >= earlier for earlier, later in pairwise(entered)):
            return None
        spans = [(graph.stages[b[0]].first, graph.stages[b[-1]].last) for b in self.blocks]
        begin = spans[0][0]
        given = [self._given(block) for block in self.blocks]
        common = {x for xs in given for x in xs if pricer.born[x] < begin}
        links = [*(xs - common for xs in given[1:]), set[int]()]
        mine = {k for ks in saves for k in ks if pricer.born[pricer.save_storage[k]] >= begin}
        levels = ChainLevels(pricer, mine, dict.fromkeys(common, entered[0]))
        ways, peaks = [], []
        profile = pricer.profile
        for b, (first, last) in enumerate(spans):
            made: dict[int, int] = {}
            for k in saves[b]:
                storage = pricer.save_storage[k]
                if pricer.born[storage] >= first:
                    made[storage] = max(made.get(storage, 0), int(pricer.released[k]))
            rest = {x for x, released in made.items() if released > entered[b]} - links[b]
            save_s = profile.save_s * len(made)
            forward = levels.forward_peak_bytes(first, last, rest)
            ways.append((Way(1, self._bytes(rest), forward, save_s, save_s, 0.0),))
            until = entered[b - 1] if b else pricer.count
            peaks.append((int(levels.backward(made, entered[b], until).max(initial=0)),))
        needed = [max(graph.saves[k].at for k in of_block) for of_block in saves]
        return Chain(
            kinds=tuple(range(count)),
            ways=tuple(ways),
            peaks_bytes=tuple(peaks),
            before_bytes=levels.before[entered],
            first_bytes=np.array([levels.level[a:z].max(initial=0) for a, z in spans]),
            forward_bytes=np.array([levels.forward_peak_bytes(a, z) for a, z in spans]),
            out_bytes=np.array([self._bytes(link) for link in links]),
            again_s=np.array([pricer.time_s[a:z].sum() for a, z in spans]),
            last_s=np.array(
                [
                    pricer.time_s[a : min(z, last)].sum()
                    for (a, z), last in zip(spans, needed, strict=True)
                ]
            ),
            edge_s=np.zeros(count),
            node_s=profile.region_s,
            after_bytes=int(levels.level[spans[-1][1] : entered[-1]].max(initial=0)),
        )

    def parts(self, schedule: Schedule) -> Iterator[tuple[Region, ...]]:
        """The region of each part of a schedule that runs again."""
        for found in self._regions(schedule):
            yield (found,)

    def _regions(self, schedule: Schedule) -> tuple[Region, ...]:
        return tuple(
            region(
                self.graph,
                self.blocks[part.first][0],
                self.blocks[part.last][-1],
                *self._regions(part.inside),
            )
            for part in schedule
            if not isinstance(part, Kept)
        )

    def _row(self) -> list[int]:
        """The longest row of stages each of which reads what the one before it returned.

        In a chain it may be what an earlier one did: not every part of such a one is a chain.
        """
        rows: list[list[int]] = []
        for run in chains(self.graph, blocks(self.graph)):
            rows.append([run[0]])
            for before, stage in pairwise(run):
                if is_linked(self.graph, (before,), stage):
                    rows[-1].append(stage)
                else:
                    rows.append([stage])
        return max(rows, key=len, default=[])

    def _given(self, block: list[int]) -> set[int]:
        """What a block reads that was made before it."""
        stages = [self.graph.stages[s] for s in block]
        read = {a.storage for s in stages for a in s.inputs if a.storage >= 0}
        return {x for x in read if self.pricer.born[x] < stages[0].first}

    def _saves(self, block: list[int]) -> list[int]:
        """What autograd saves in a block for backward, parameters apart."""
        graph, found = self.graph, []
        for stage in block:
            s = graph.stages[stage]
            found += [
                k
                for k in range(s.first_save, s.last_save)
                if (storage := self.pricer.save_storage[k]) >= 0
                and graph.storages[storage].category not in _HELD
                and graph.saves[k].first_use >= 0
            ]
        return found

    def _bytes(self, storages: set[int]) -> int:
        return int(sum(self.pricer.bytes[s] for s in storages))
