"""What a run finds in its directory, and how it comes back to a checkpoint that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from torch import nn

from actckpt.checkpoint.discovery import Checkpoint
from actckpt.checkpoint.retention import ranked
from actckpt.errors import ArgumentError
from actckpt.importing.loaded_weights import LoadedWeights
from actckpt.importing.loading import WeightsSource, load_weights
from actckpt.resuming.choosing import Choice, Chosen
from actckpt.resuming.journal import Journal
from actckpt.resuming.journal_compare import Verified
from actckpt.resuming.places import Places
from actckpt.resuming.progress import Progress
from actckpt.resuming.resumed import Resumed
from actckpt.resuming.run_state import RunState
from actckpt.resuming.saves import Saves
from actckpt.resuming.saving import Saver

StartFrom: TypeAlias = WeightsSource | Callable[[nn.Module], LoadedWeights]


class Resumable:
    """The half of a `Checkpointer` that reads: it makes no checkpoint, and deletes none.

    Its attributes are set by the other half.
    """

    _places: Places
    _choice: Choice
    _fresh: bool
    _saver: Saver
    _state: RunState
    _progress: Progress
    _journal: Journal
    _saves: Saves
    _started_from: LoadedWeights | None = None

    # ---- finding

    def list(self) -> list[Checkpoint]:
        """The checkpoints in the directory, newest first, without those of damaged manifests.

        Waits for a save in the background, as everything does that reads the directory.
        """
        self._saver.wait()
        return list(self._places.find().checkpoints)

    def best(self, metric: str | None = None, mode: str = "min") -> Checkpoint | None:
        """The best checkpoint, the newer of equal ones; None if none has the metric.

        Args:
            metric: by default that of ``keep_best``.
            mode: "min" or "max", for a metric given here.

        Raises:
            ArgumentError: there is no metric to go by.
        """
        return next(iter(ranked(self.list(), *self._goal(metric, mode))), None)

    def _goal(self, metric: str | None, mode: str) -> tuple[str, str]:
        if mode not in ("min", "max"):
            raise ArgumentError(f'mode must be "min" or "max"; found {mode!r}')
        if metric is not None:
            return metric, mode
        if self._places.keep.best is None:
            raise ArgumentError("there is no metric to go by: give one here or in keep_best")
        return self._places.keep.best[:2]

    def pin(self, step: int, pinned: bool = True) -> None:
        """Keeps the newest checkpoint of a step whatever the retention says, or no longer.

        Raises:
            CheckpointError: there is no checkpoint of that step, or somebody else writes here.
        """
        self._saver.wait()
        self._places.pin(step, pinned)

    def stop_early(self, patience: int, metric: str | None = None, mode: str = "min") -> bool:
        """Whether so many reports of a metric came without one better than all before.

        Counted over the whole run, resumed or not. A NaN counts as a report that is no better.

        Args:
            patience: reports, at least 1: as many `step` or `save` calls with the metric.
            metric: by default that of ``keep_best``.
            mode: "min" or "max", for a metric given here.

        Raises:
            ArgumentError: there is no metric to go by.
        """
        if type(patience) is not int or patience < 1:
            raise ArgumentError(f"patience must be at least 1; found {patience!r}")
        return self._progress.history.since_best(*self._goal(metric, mode)) >= patience

    # ---- coming back

    def resume(self, *, start_from: StartFrom | None = None) -> Resumed | None:
        """The run put back to its newest checkpoint that verifies, and what was found on the way.

        None in an empty directory, or with ``fresh``, and nothing is changed then but by
        ``start_from``. A directory that cannot be written is read, and a note says so; saving
        raises then.

        Args:
            start_from: weights that a run begins with, and one that goes on does not look at:
                anything that `actckpt.load_weights` takes, or a function of the model that loads
                them, ``lambda model: actckpt.load_weights(model, path, names=...)``. What became
                of them is `started_from`. Averages of the weights (``ema``) are not changed.

        Raises:
            CheckpointError: there are checkpoints and none verifies, or somebody else writes here.
            CheckpointMismatchError: the checkpoint is of other objects; they are as before.
            ActckptError: as `actckpt.load_weights`; the model is as before. Of many ranks all raise
                if one does, and those that could load have the weights.
        """
        self._saver.wait()
        if self._fresh:
            self._places.take_up()
        read_only = self._places.acquire_unless_read_only()
        chosen = self._choice.newest()
        if chosen is not None:
            notes = chosen.unreached + (() if read_only is None else (str(read_only),))
            return self._put(chosen, notes=notes, again=True)
        if read_only is not None:
            raise read_only
        if start_from is not None:
            with self._choice.agreed():
                begun = _started(self._state.model, start_from)
            self._started_from = begun
        self._places.go_on()
        self._saves.under_way.watch()
        return None

    @property
    def started_from(self) -> LoadedWeights | None:
        """What `resume` began the run with; None where it went on, or was given nothing."""
        return self._started_from

    def restore(self, step: int | None = None, *, only: Iterable[str] | None = None) -> Resumed:
        """The run put back to the newest checkpoint of a step, or the newest of all.

        What is saved from then on is newer than every existing checkpoint, whatever its step.

        Args:
            only: items to put back, such as ``["model"]``; the run's position and random states
                are then left as they are. None puts everything back.

        Raises:
            CheckpointFormatError: that checkpoint is damaged.
            CheckpointError: there is no such checkpoint.
            CheckpointMismatchError: it is of other objects; they are as before.
        """
        self._saver.wait()
        chosen = self._choice.of_step(step)
        return self._put(chosen, None if only is None else frozenset(only))

    def _put(
        self,
        chosen: Chosen,
        only: frozenset[str] | None = None,
        notes: tuple[str, ...] = (),
        *,
        again: bool = False,
    ) -> Resumed:
        checkpoint, items = chosen.checkpoint, chosen.items
        where = str(checkpoint.path)
        elsewhere = self._choice.elsewhere(self._state.names())
        with self._choice.agreed():
            if only is None:
                many = checkpoint.manifest.world_size > 0
                items = self._progress.moved(items) if many else items
                self._progress.check(items, where, of_all=many)
            fitting = self._state.fitting(items, where, only, elsewhere)
        put = self._state.put(fitting, checkpoint.manifest.versions)
        self._places.go_on(whole=only is None)
        inexact = [*chosen.inexact, *put.inexact]
        if only is None:
            inexact += self._progress.inexact(items)
            inexact += self._saves.under_way.put(items.get("under-way"))
            self._saves.under_way.watch()
            self._progress.put(items)
            self._saves.put_back(checkpoint)
        if again:
            unseen = self._journal.resumed(checkpoint)
        else:
            unseen = self._journal.restored(checkpoint if only is None else None)
        return Resumed(
            checkpoint=checkpoint,
            epoch=items["position"]["epoch"],
            batch=items["position"]["batch"],
            skipped=chosen.skipped,
            inexact=tuple(inexact),
            plan=put.plan,
            notes=(*put.notes, *filter(None, (unseen, *notes))),
        )

    @property
    def verified(self) -> Verified:
        """How many steps were made again since `resume`, and the first that came out otherwise.

        A run is nearly always killed some steps after its last checkpoint. What was seen of them is
        in a journal beside the checkpoints: digests of the batches, the random states and a sample
        of the weights, and the metrics. So `Resumed.bit_exact` is what is expected, and this is
        what was seen. After `restore` nothing is compared.
        """
        return self._journal.verified


def _started(model: nn.Module, start_from: StartFrom) -> LoadedWeights:
    if not callable(start_from):
        return load_weights(model, start_from)
    report = start_from(model)
    if not isinstance(report, LoadedWeights):
        raise ArgumentError(
            f"start_from must return what load_weights does; found {type(report).__name__}"
        )
    return report
