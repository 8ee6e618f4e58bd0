"""Where a run is in its data, and how a loader is brought back to that place.

A DataLoader's order is drawn when an epoch begins. So the random states of that moment are kept; a
resumed run draws the same order again from them, compares it with what was handed out, and skips
that without loading it. A loader that keeps a position of its own is asked for it instead.

The passes that count are those of `Checkpointer.steps`; or, in a loop of the user's own, those over
the loader that was given, which is watched.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from actckpt.errors import CheckpointMismatchError
from actckpt.resuming.batch_chain import BatchChain
from actckpt.resuming.begun_before import is_begun_before
from actckpt.resuming.joined import joined
from actckpt.resuming.loaders import (
    Loader,
    by_epoch,
    facts_of,
    is_reused,
    is_streamed,
    length_of,
    own_state_of,
    source_of,
    workers_of,
    workers_persist,
)
from actckpt.resuming.passes import (
    AheadOfHandingOut,
    Pass,
    begun,
    begun_later,
    forget_workers,
    random_states_here,
    reopened,
    same_random_states,
    state_between,
)
from actckpt.resuming.position_checks import check_fits
from actckpt.resuming.position_claims import inexact
from actckpt.resuming.reading import Reading
from actckpt.resuming.sampler_states import SamplerStates
from actckpt.resuming.seeded_samples import tell_epoch
from actckpt.resuming.steps_seen import StepsSeen
from actckpt.resuming.watching import Begin, unwatched_iter

logger = logging.getLogger("actckpt")


class Owner(Protocol):
    """Whom a position tells, and asks."""

    def handed_out_elsewhere(self, made: Pass, batch: Any) -> None:
        """A loop of the user's own was given a batch."""

    def asked_on(self) -> None:
        """It has done with the last one what it does."""

    def pass_begins(self) -> None:
        """One does that was restored."""

    def put_random(self) -> None:
        """Puts back the random states that were restored, as long as no step was made since."""


class DataPosition:
    """Epoch, and batches handed out in it.

    Args:
        owner: is not kept alive by this.
    """

    def __init__(self, owner: Owner) -> None:
        self.epoch = 0
        self._owner = weakref.ref(owner)
        self._pass: Pass | None = None
        # passes that ended before the first step was counted
        self._uncounted = 0
        self._seen = StepsSeen()
        self._samplers = SamplerStates(None)
        self._pending: dict[str, Any] | None = None
        # taken up by a loop that has made no step since
        self._taken: dict[str, Any] | None = None
        # a pass that goes on elsewhere, since the run was put back in it
        self._moving: Pass | None = None
        # of which it is known that what is read after it may be another
        self._doubted: dict[str, Any] | None = None
        self._open: Callable[[Begin], Iterator[Any]] | None = None
        self._told = 0  # what a sampler was last told; they all begin at 0
        self._by_steps = False
        # whether an integration says where the passes of a trainer's loop begin and end
        self.is_driven = False
        # whether that loop reads a batch before it trains on the one before
        self.reads_ahead = False
        # whether its next iteration is one that it does not read
        self.is_waiting = False
        # the last whole pass that was opened, and the random states of then
        self._opened: tuple[Pass, dict[str, Any]] | None = None
        # whether the loader keeps it, and was put back by its own means
        self.is_loaders_own = False

    @property
    def batch(self) -> int:
        """Batches handed out in this epoch."""
        if self._pending is not None:
            return int(self._pending["batch"])
        return 0 if self._pass is None or self._pass.ended else self._pass.batch

    @property
    def is_pending(self) -> bool:
        """Whether it was restored, and nothing has been read from there yet."""
        return self._pending is not None

    def begins(self, loader: Loader) -> None:
        """It is a place in this loader from now on."""
        self._samplers = SamplerStates(source_of(loader))

    @property
    def watched_pass(self) -> Pass | None:
        """The pass that gave the last batch, in a loop of the user's own."""
        return None if self._by_steps else self._seen.latest

    def workers_drew(self, loader: Loader | None) -> bool:
        """Whether workers, if there are any, have drawn what a resumed run's would not draw again.

        In the middle of an epoch, or from one to the next, in workers that persist. A stream is
        read again from its beginning.
        """
        source = source_of(loader)
        if not self.batch or self._pass is None or self._pass.start is None:
            return self.batch > 0 or is_reused(source)
        return not is_streamed(source) or self._pass.start["reused"]

    # ---- as a state

    def state_dict(self, loader: Any, *, trained: bool) -> dict[str, Any]:
        """The position as a state, between two batches.

        Args:
            trained: optimizers have made steps, counted or not.
        """
        if self._pending is not None:
            return self._pending  # nothing has been read since it was restored
        if self._taken is not None and not self._seen.holds_batch():
            return self._taken
        made = self._pass
        if not (self._by_steps or self._seen.steps):
            made = self._seen.latest or made  # nobody counts steps
        epoch = self.epoch + self._uncounted
        batch = 0 if made is None or made.ended else made.batch
        state: dict[str, Any] = {
            "epoch": epoch,
            "batch": batch,
            "batches": length_of(loader),
            "workers": workers_of(loader),
            "persist": workers_persist(loader),
            "order": facts_of(loader),
            "loop": "steps" if self._by_steps else "own",
            "unkept": self._seen.unkept(
                loader, by_steps=self._by_steps, driven=self.is_driven, trained=trained
            ),
        }
        if is_begun_before(source_of(loader)) and not (batch or epoch):
            state["between"] = state_between(loader, source_of(loader), self._samplers)
            return state
        if loader is None or not (batch or epoch):
            return state  # asking a loader that was never read could make it draw
        if (own := own_state_of(loader)) is not None or (made and made.own is not None):
            state["loader"] = (own or made.own).state_dict()  # type: ignore[union-attr]
        elif batch:
            assert made is not None
            state |= made.state_dict()
            state["last"] = source_of(loader) is not loader and loader.end_of_dataloader
        else:
            state["between"] = state_between(loader, source_of(loader), self._samplers)
            if self.is_driven:
                # of a pass that may have been left; the next one is told its epoch by the trainer
                state["between"]["iteration"] = None
        return state

    def check(self, state: dict[str, Any] | None, loader: Loader | None, where: str) -> None:
        """Raises unless ``loader`` can be brought to a saved position.

        Args:
            state: None is the position that was restored and not taken up yet.

        Raises:
            CheckpointMismatchError: it has another number of batches, or is of another kind.
        """
        state = self._pending if state is None else state
        if loader is not None and state is not None:
            check_fits(state, loader, where)

    def inexact(self, state: dict[str, Any], loader: Loader | None, step: int) -> list[str]:
        """Why what is read after a saved position may be another than it would have been.

        Args:
            step: optimizer steps that had been made.
        """
        reasons = inexact(state, loader, step, self._samplers)
        self._doubted = state if reasons else None
        return reasons

    def doubt(self, state: dict[str, Any]) -> None:
        """What is read after a saved position is known to be another: it goes on all the same."""
        self._doubted = state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a saved position; the loader is moved there when it is next read."""
        if not self._by_steps:
            self._moving = self._pass
        self.epoch = state["epoch"]
        self._pending, self._taken, self._pass = state, None, None
        self._uncounted = 0
        self._seen = StepsSeen()

    # ---- reading

    def rest_of_epoch(self, loader: Loader) -> Iterator[Any]:
        """The batches of the epoch that were not handed out yet."""
        self._by_steps = True
        pending, self._pending, self._taken = self._pending, None, None
        if pending is None and self.batch:  # a loop that was left early; this is another pass
            self.epoch += 1
        tell_epoch(loader, self.epoch)
        if source_of(loader) is loader:  # accelerate's tell the epoch themselves
            self._tell_sampler(loader)

        def begin() -> tuple[Pass, Iterator[Any]]:
            made = self._pass = self._made(loader, pending)
            start = partial(unwatched_iter, loader)
            put_last = _nothing if pending is None else self._put_last
            return made, self._begun(loader, start, made, pending, put_last)

        reading = Reading(self, begin)
        for batch in reading:
            yield batch
            if self.is_pending:
                return  # restored in the meantime: the next pass begins there
            self._seen.next_batch()
        if pending is None and not reading.made.batch:
            raise ValueError(
                f"the loader gave no batch in epoch {reading.made.epoch} (its length: "
                f"{length_of(loader)}): it is empty, or can be read only once. Pass one that "
                "gives batches every epoch"
            )

    def watched(self, loader: Loader, start: Begin) -> Iterator[Any]:
        """The batches of a pass that a loop of the user's own makes over the loader."""
        if self._by_steps:
            return start()  # its passes are those that count
        if self.is_waiting:
            return iter(())

        def begin() -> tuple[Pass, Iterator[Any]]:
            pending = self._pending or self._taken
            if pending is None or pending.get("loop") != "own":
                made = self._made(loader, None, watched=True)
                iterator = self._begun(loader, start, made, None, _nothing)
                iterator = self._ahead(loader, made, iterator)
                self._opened = made, random_states_here()
                return made, iterator
            self._pending, self._taken, self._moving = None, pending, None
            if (owner := self._owner()) is not None:
                owner.pass_begins()
            made = self._made(loader, pending, watched=True)
            made.goes_on = True
            logger.info("actckpt: the loop goes on at batch %d of epoch %d", made.batch, made.epoch)
            iterator = self._begun(loader, start, made, pending, self._put_last)
            return made, self._ahead(loader, made, iterator)

        return Reading(self, begin)

    def reads(self, loader: Loader) -> None:
        """What was opened is read from now on; hooks may have drawn in the meantime."""
        opened, self._opened = self._opened, None
        if opened is not None and not same_random_states(opened[1], random_states_here()):
            begun_later(source_of(loader), opened[0])

    def _ahead(self, loader: Loader, made: Pass, iterator: Iterator[Any]) -> Iterator[Any]:
        """The same batches; kept is what they are read from, where that is done ahead and here."""
        here = self.reads_ahead and not workers_of(source_of(loader))
        return AheadOfHandingOut(iterator, made) if here else iterator

    def source_opened(self, source: Loader, start: Begin) -> Iterator[Any]:
        """An iterator over the loader that another reads from."""
        opened, self._open = self._open, None
        return start() if opened is None else opened(start)

    def _made(self, loader: Loader, pending: dict[str, Any] | None, watched: bool = False) -> Pass:
        batch = 0 if pending is None else pending["batch"]
        return Pass(loader, self._samplers, self.epoch, batch, watched=watched)

    def _tell_sampler(self, loader: Loader) -> None:
        """Sets the epoch of a sampler that has one, unless somebody else has since we did."""
        sampler = by_epoch(loader)
        if sampler is not None and sampler.epoch == self._told:
            sampler.set_epoch(self.epoch)
            self._told = self.epoch

    def _begun(
        self,
        loader: Any,
        start: Begin,
        made: Pass,
        pending: dict[str, Any] | None,
        put_last: Callable[[], None],
    ) -> Iterator[Any]:
        """An iterator over what is left of a pass."""
        own = own_state_of(loader)
        self.is_loaders_own = own is not None or "loader" in (pending or {})
        if pending is not None and "loader" in pending:
            made.own = loader
            loader.load_state_dict(pending["loader"])
            if made.batch:
                iterator = start()
                put_last()
                return iterator
            loader.state_dict()  # some only now do what was loaded, and draw for it
            put_last()
            return start()
        if own is not None:
            made.own = own
            put_last()
            return start()
        source = source_of(loader)
        if source is loader:
            return self._source_begun(source, made, pending, put_last, start)
        begin_source = partial(self._source_begun, source, made, pending, put_last)
        return joined(loader, start, made, pending, begin_source, self._opening)

    def _source_begun(
        self,
        source: Loader,
        made: Pass,
        pending: dict[str, Any] | None,
        put_last: Callable[[], None],
        start: Begin,
    ) -> Iterator[Any]:
        if pending is not None:
            forget_workers(source)
        if pending is None or not made.batch:
            between = None if pending is None else pending.get("between")
            return begun(source, start, made, between, put_last)
        try:
            return reopened(source, start, made, pending, put_last, partial(self._accept, pending))
        except CheckpointMismatchError:
            # whoever iterates again is told nothing new, and goes on with what there is
            self._doubted = self._pending = pending
            self._pass = None
            raise

    @contextmanager
    def _opening(self, opened: Callable[[Begin], Iterator[Any]]) -> Iterator[None]:
        """Meanwhile that opens the loader that another reads from."""
        self._open = opened
        try:
            yield
        finally:
            self._open = None

    def _accept(self, pending: dict[str, Any]) -> bool:
        """Whether a pass goes on although its order is another: it was said before."""
        if pending is not self._doubted:
            return False
        logger.warning(
            "actckpt: the first %d batches of epoch %d, drawn again, are not those that the run "
            "was trained on: it goes on behind them",
            pending["batch"],
            pending["epoch"],
        )
        return True

    # ---- what is told by a pass, and by the run

    def handed_out(self, reading: Reading, batch: Any) -> None:
        """A pass gave a batch."""
        reading.made.handed_out()
        self._seen.handed_out(reading)
        if reading.made.watched and (owner := self._owner()) is not None:
            owner.handed_out_elsewhere(reading.made, batch)

    def asked(self, reading: Reading) -> None:
        """A pass is asked for a batch."""
        if reading.made.watched and (owner := self._owner()) is not None:
            owner.asked_on()

    def ended(self, reading: Reading) -> None:
        """A pass has no more."""
        self._end(reading.made)

    def leave(self) -> None:
        """No more is read of the pass that gave the last batch."""
        if self._seen.latest is not None:
            self._end(self._seen.latest)

    def _end(self, made: Pass) -> None:
        if not made.ended:
            made.ended = True
            if made.goes_on and made.watched and self._taken is not None:
                self._pass, self._taken = made, None
            if made is self._pass:
                self.epoch = made.epoch + 1
            elif made.watched and not self._seen.steps:
                self._uncounted += 1

    def moved(self, reading: Reading) -> bool:
        """Whether the run was put back in this very pass."""
        return self._moving is not None and reading.made is self._moving

    def stepped(self) -> None:
        """An optimizer step was made."""
        made = self._seen.stepped(by_steps=self._by_steps)
        if made is not None:
            made.chain = None if made.chain is None else BatchChain()
        lost = None if self._by_steps else self._pending
        if lost is not None:
            self._pending = None
        if lost is not None and not lost.get("unkept"):
            logger.warning(
                "actckpt: the run was put back to batch %d of epoch %d, and a step was made on "
                "data from elsewhere: what is read from now on is not what it would have read. "
                "Iterate run.steps(loader), or the very loader that the Checkpointer was given",
                lost["batch"],
                lost["epoch"],
            )
        self._taken = self._moving = None
        self._uncounted = 0
        if self._by_steps or made is None or made is self._pass:
            return
        if self._pass is not None and not self._pass.ended:
            self.epoch += 1
            self._seen.left_early()
        made.epoch = self.epoch
        self._pass = made
        if made.ended:
            self.epoch += 1

    def _put_last(self) -> None:
        if (owner := self._owner()) is not None:
            owner.put_random()


def _nothing() -> None:
    """Puts nothing back."""
