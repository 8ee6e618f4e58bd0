"""The optimum for a chain of whole blocks (Rotor)."""

from __future__ import annotations

import dataclasses

from actckpt.data.budget_error import BudgetError
from actckpt.data.graph import Graph
from actckpt.data.plan import Plan
from actckpt.data.profile import Profile
from actckpt.errors import PlanError
from actckpt.policies.solver.block_chain import BlockChain
from actckpt.policies.solver.chain_plans import chain_plans, plan_of_parts
from actckpt.pricing.simulate import Pricer


def rotor(graph: Graph, profile: Profile, budget_bytes: int | None) -> Plan:
    """The longest chain of linked blocks, each kept whole or recomputed, as often as is best.

    Optimal for chains among plans that keep all of a block or nothing until backward has passed it,
    up to the units that bytes are counted in. What is not in the chain is left alone.

    References:
        Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova 2019, Optimal checkpointing for
        heterogeneous chains: how to train deep neural networks with limited memory.

    Raises:
        BudgetError: nothing fits; ``smallest_bytes`` is the lowest peak found.
        PlanError: the model has no chain of two or more blocks.
    """
    pricer = Pricer(graph, profile)
    untouched = Plan("rotor")
    if budget_bytes is None or pricer.estimate(untouched).peak_bytes <= budget_bytes:
        return untouched
    plans = chain_plans(BlockChain(pricer))
    if plans is None:
        raise PlanError("policy rotor needs a chain of two or more blocks, and found none")
    found = plans.fastest(budget_bytes)
    if found is not None:
        return dataclasses.replace(plan_of_parts(found), policy="rotor")
    smallest = dataclasses.replace(plan_of_parts(plans.smallest or ()), policy="rotor")
    smallest_bytes = pricer.estimate(smallest).peak_bytes
    raise BudgetError(
        f"no plan within {budget_bytes} bytes: the smallest peak found is {smallest_bytes}",
        budget_bytes=budget_bytes,
        smallest_bytes=smallest_bytes,
        smallest_plan=smallest,
    )
