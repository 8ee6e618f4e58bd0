"""`MemoryBudget`: a loop with accelerate within a memory budget, and resumed to the last bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Unpack

from accelerate import Accelerator
from torch import nn

from actckpt.errors import ArgumentError, CheckpointError
from actckpt.integrations.budget_arguments import BudgetArguments, Settings
from actckpt.integrations.replicas import no_replicas, wrapper_of


class MemoryBudget(BudgetArguments):
    """What a loop with an Accelerator calls to train within a memory budget, and to resume.

        accelerator = Accelerator(gradient_accumulation_steps=4, mixed_precision="bf16")
        budget = MemoryBudget(accelerator, "8GB", checkpoints="runs/a")
        model, optimizer, loader, scheduler = budget.prepare(model, optimizer, loader, scheduler)
        for step, batch in budget.steps(epochs=3):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    The plan is made in the first training step, with the optimizer counted and, where the
    accelerator accumulates, gradients that stay. With ``checkpoints`` the full state of the run is
    kept there. Killed at any instant and started again, the same script goes on from there: every
    later loss and the final weights are those of the run that was not killed. Where that cannot
    be, `resumed` says why.

    The same in two calls of your own, before or after ``accelerator.prepare``:
    ``actckpt.optimize(model, "8GB", optimizer=optimizer, accumulate=True)``, and
    ``actckpt.Checkpointer("runs/a", model=model, optimizer=optimizer, loader=prepared_loader)``
    with ``run.step()`` where ``accelerator.sync_gradients``.

    Args:
        accelerator: that the loop trains with.
        budget_gb: as for `actckpt.optimize`. None with a policy of another name than "auto" applies
            that without a bound, and with "auto" only keeps checkpoints.
        checkpoints: a directory of this run alone, made if it does not exist.
        every: "auto"; of optimizer steps, a duration, "auto" or None, as for
            `actckpt.Checkpointer`, and so are the next three.
        keep_last: 3; how many of the newest stay, or None for all.
        keep_best: None; (metric, "min" or "max", how many) that stay besides.
        fresh: False; begins anew where another run's checkpoints are.
        extra: None; further objects of the run, by name, as for `actckpt.Checkpointer`, beside
            those that are registered with the accelerator.
        policy: "auto"; as for `actckpt.optimize`.
        scope: "step"; as for `actckpt.optimize`.

    Attributes:
        report: of the plan for the largest batch, once one was trained on.
        run: the `actckpt.Checkpointer`, from `prepare` on; None without ``checkpoints``.
        resumed: what resuming found; None where the run begins anew.

    Raises:
        BudgetError, PlanError, ArgumentError: an argument is not what it must be.
    """

    _begins = "the loop"

    def __init__(
        self, accelerator: Accelerator, budget_gb: float | str | None, **settings: Unpack[Settings]
    ) -> None:
        super().__init__(budget_gb, **settings)
        if not isinstance(accelerator, Accelerator):
            raise ArgumentError(
                "MemoryBudget begins with the Accelerator of the loop, as in "
                f"MemoryBudget(accelerator, '8GB'); found {accelerator!r:.60}"
            )
        self._accelerator = accelerator
        self._loader: Any = None

    def prepare(
        self, model: nn.Module, optimizer: Any, loader: Iterable[Any], scheduler: Any = None
    ) -> tuple[Any, Any, Any, Any]:
        """What ``accelerator.prepare`` makes of these: planned, and put back to where the run was.

        Objects given to ``accelerator.register_for_checkpointing`` before are kept too.

        Args:
            scheduler: None where there is none, and then among the results.

        Raises:
            PlanError: the accelerator cuts the model over its processes.
            CheckpointError: as `actckpt.Checkpointer.resume`.
        """
        if self._loader is not None:
            raise CheckpointError("prepare was called before: one MemoryBudget keeps one run")
        accelerator = self._accelerator
        given = [model, optimizer, loader, *([] if scheduler is None else [scheduler])]
        prepared = [*accelerator.prepare(*given), *([None] if scheduler is None else [])]
        model, optimizer, self._loader, scheduler = prepared
        if accelerator.num_processes > 1 and wrapper_of(model) is None:
            raise no_replicas(
                f"this accelerator has {accelerator.num_processes} processes around a "
                f"{type(model).__name__}",
                "Start it with torchrun, and leave its plugins for FSDP and DeepSpeed out",
            )
        self._optimize(model, optimizer, accelerator.gradient_accumulation_steps > 1)
        registered = getattr(accelerator, "_custom_objects", [])
        run = self._checkpointer(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=accelerator.scaler,
            loader=self._loader,
            own={f"registered-{n}": one for n, one in enumerate(registered)},
        )
        if run is not None:
            self.resumed = run.resume()
        return model, optimizer, self._loader, scheduler

    def steps(self, *, epochs: int) -> Iterator[tuple[int, Any]]:
        """(steps made so far, batch) of what is left of the run, from the exact position.

        A step is counted, and saved where that is due, when the loop asks for the next batch after
        one at which the accelerator has synchronised gradients. The directory is somebody else's
        to write in when the last batch was used.

        Args:
            epochs: of the whole run, including those before a resume.

        Raises:
            CheckpointError: as `actckpt.Checkpointer.step`; or `prepare` was not called.
        """
        if self._loader is None:
            raise CheckpointError("call prepare(model, optimizer, loader) first")
        if self.run is None:
            made = 0
            for _ in range(epochs):
                for batch in self._loader:
                    yield made, batch
                    made += self._accelerator.sync_gradients
            return
        with self.run as run:
            for step, batch in run.steps(epochs=epochs):
                yield step, batch
                if self._accelerator.sync_gradients:
                    run.step()
