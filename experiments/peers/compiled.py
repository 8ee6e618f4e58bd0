"""`torch.compile` with an activation memory budget, run eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch._dynamo
import torch._functorch.config
from torch import nn

from experiments.peers.subject import Subject


def with_budget(budget: float) -> Callable[[Subject, nn.Module], nn.Module]:
    """`backend="aot_eager"` with `torch._functorch.config.activation_memory_budget`."""

    def prepare(_: Subject, model: nn.Module) -> nn.Module:
        aot_eager = torch._dynamo.lookup_backend("aot_eager")

        # a backend of its own: equal code with another backend is compiled anew, so that several
        # budgets live in one process
        def backend(graph: Any, inputs: Any, **options: Any) -> Any:
            with torch._functorch.config.patch(activation_memory_budget=budget):
                return aot_eager(graph, inputs, **options)

        torch._dynamo.config.recompile_limit = 64
        compiled: Any = torch.compile(model, backend=backend, dynamic=False)
        return cast(nn.Module, compiled)

    return prepare
