"""What people use today, each as a change of a copy of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from experiments.peers import checkpointing, compiled, planners
from experiments.peers.subject import Subject


@dataclass(frozen=True, slots=True)
class Peer:
    """One thing to compare with.

    Args:
        group: peers of one group are measured side by side in one process.
        prepare: what to call in place of the model, which it may change; it runs no step of it.
            Raises `NotApplicable` with the reason where it cannot be used.
    """

    name: str
    group: str
    prepare: Callable[[Subject, nn.Module], nn.Module]


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("torch per block", "checkpoint", checkpointing.per_block),
        Peer("Hugging Face's switch", "checkpoint", checkpointing.hugging_face),
        Peer("sqrt(n) segments", "checkpoint", checkpointing.segments),
        Peer("sqrt(n) segments, and blocks", "checkpoint", checkpointing.nested),
        Peer("SAC, all products", "selective", checkpointing.all_products),
        Peer("SAC, every second", "selective", checkpointing.every_second),
        *(
            Peer(
                f"compile, budget {budget}",
                "compile 1.0 to 0.5" if budget >= 0.5 else "compile 0.3 to 0.0",
                compiled.with_budget(budget),
            )
            for budget in (1.0, 0.8, 0.5, 0.3, 0.1, 0.0)
        ),
        *(Peer(f"sac_ilp, {share}", "sac_ilp", planners.sac_ilp(share)) for share in (0.8, 0.65)),
        *(Peer(f"ckptplan, {share}", "planners", planners.ckptplan(share)) for share in (0.7, 0.5)),
        *(Peer(f"Rockmate, {share}", "planners", planners.rockmate(share)) for share in (0.5,)),
    )
}
GROUPS = tuple(dict.fromkeys(peer.group for peer in PEERS.values()))
