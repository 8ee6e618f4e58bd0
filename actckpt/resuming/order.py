"""The order in which a pass reads its data, as a digest, and passes that begin further on.

Of a loader with a sampler, the sampler's draws are digested, which costs next to nothing and is
compared without reading any data; of any other, the batches.
"""

from __future__ import annotations

import marshal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import xxhash

from actckpt.errors import CheckpointMismatchError
from actckpt.resuming.batch_digest import batch_digest
from actckpt.resuming.live_objects import Stateful
from actckpt.resuming.loaders import index_sampler_name, is_reused

_END = object()
_NUMBERS = frozenset({int, bool, str})


class Order:
    """A digest of what was drawn, of which a part was handed out.

    Args (attributes):
        text, taken: digest and number of what was handed out.
        last, drawn: of what was drawn.
        omitted: the first part that was not digested, or "".
    """

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()
        self._ahead: deque[str] = deque()
        self.text = self.last = self._hash.hexdigest()
        self.taken = self.drawn = 0
        self.omitted = ""

    def draw(self, what: Any) -> None:
        """Adds what comes next: a sampler's draw, or a batch."""
        if type(what) is int or (type(what) is list and _NUMBERS.issuperset(map(type, what))):
            self._hash.update(marshal.dumps(what, 2))
        else:
            digest = batch_digest(what)
            self._hash.update(digest.text.encode())
            if digest.omitted and not self.omitted:
                self.omitted = digest.omitted[0]
        self.last = self._hash.hexdigest()
        self._ahead.append(self.last)
        self.drawn += 1

    def take(self, count: int) -> None:
        """So many more were handed out."""
        for _ in range(min(count, len(self._ahead))):
            self.text = self._ahead.popleft()
            self.taken += 1

    def state_dict(self) -> dict[str, Any]:
        """As it is."""
        return {
            "text": self.text,
            "taken": self.taken,
            "last": self.last,
            "drawn": self.drawn,
            "omitted": self.omitted,
        }


class Replay:
    """What a pass begins with: draws that were handed out before and are left out.

    Args:
        count: of them.
        saved: what `Order.state_dict` said of them; None compares nothing.
        accept: called before it is raised that they differ.
    """

    def __init__(
        self,
        count: int = 0,
        saved: dict[str, Any] | None = None,
        accept: Callable[[], bool] = lambda: False,
    ) -> None:
        self._count = count
        self._saved = saved
        self._accept = accept

    def skip(self, iterator: Iterator[Any], order: Order) -> None:
        """Draws them again.

        Raises:
            CheckpointMismatchError: there are fewer, or others.
        """
        for done in range(self._count):
            drawn = next(iterator, _END)
            if drawn is _END:
                raise CheckpointMismatchError(
                    f"the run was {self._count} batches into the epoch; the loader has only "
                    f"{done}. Pass the same data, batch size and drop_last"
                )
            order.draw(drawn)
        order.take(self._count)
        saved = self._saved
        if saved is None or saved["taken"] != self._count or saved["text"] == order.text:
            return
        if not self._accept():
            raise CheckpointMismatchError(
                f"the first {self._count} batches of this epoch, drawn again, are others than "
                "those that the run was trained on: the data or its order changed, or is drawn "
                "from something that no checkpoint holds. Nothing was read yet. Pass what was "
                "passed before; or iterate again, which goes on behind these other batches "
                "(some samples may come twice, and others not at all)"
            )


class Recorder:
    """A sampler in a loader's sampler's place, whose passes are recorded where one is prepared."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self._sampler = sampler
        self._prepared: tuple[Order, Replay, Callable[[], None] | None] | None = None
        self.current: RecordedPass | None = None

    def prepare(self, order: Order, replay: Replay, begin: Callable[[], None] | None) -> None:
        """The next pass is recorded.

        Args:
            begin: called before the sampler is read, and so after the loader has drawn its seed.
        """
        self._prepared, self.current = (order, replay, begin), None

    def forget(self) -> None:
        """What a pass began with leads to the loader, whose workers keep this if they persist."""
        self._prepared = None

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        prepared = self._prepared
        # a loader with workers begins twice, and reads only then
        if prepared is None or (self.current is not None and self.current.has_begun):
            self._prepared = None
            return iter(self._sampler)
        kind = RecordedPass
        if prepared[2] is None:
            iterator = iter(self._sampler)
            kind = _StatefulPass if isinstance(iterator, Stateful) else RecordedPass
        else:
            iterator = None
        self.current = kind(self._sampler, iterator, *prepared)
        return self.current


class _StatefulRecorder(Recorder):
    """Of a sampler whose state others ask for, such as torchdata's loader."""

    def state_dict(self) -> Any:
        return self._sampler.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Any) -> None:
        self._sampler.load_state_dict(state_dict)  # type: ignore[attr-defined]


class RecordedPass:
    """One pass over a sampler, without what it begins with."""

    def __init__(
        self,
        sampler: Iterable[Any],
        iterator: Iterator[Any] | None,
        order: Order,
        replay: Replay,
        begin: Callable[[], None] | None,
    ) -> None:
        self._sampler = sampler
        self._iterator = iterator
        self._order = order
        self._begin = begin
        self._replay: Replay | None = replay

    @property
    def has_begun(self) -> bool:
        """Whether something was read."""
        return self._replay is None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        drawn = next(self.read())
        self._order.draw(drawn)
        return drawn

    def read(self) -> Iterator[Any]:
        """The sampler's iterator, once what is to be left out was."""
        replay, self._replay = self._replay, None
        if replay is not None:
            # workers that persist keep this, and it would keep their loader: a cycle, which
            # the garbage collector ends by closing their queues first, and waits for 10 s
            begin, self._begin = self._begin, None
            if begin is not None:
                begin()
            if self._iterator is None:
                self._iterator = iter(self._sampler)
            replay.skip(self._iterator, self._order)
        assert self._iterator is not None
        return self._iterator


class _StatefulPass(RecordedPass):
    """Over an iterator whose state others ask for."""

    def state_dict(self) -> Any:
        return self._iterator.state_dict()  # type: ignore[union-attr]

    def load_state_dict(self, state_dict: Any) -> None:
        self._iterator.load_state_dict(state_dict)  # type: ignore[union-attr]


def opened(
    loader: Any,
    begin_iteration: Callable[[], Iterator[Any]],
    order: Order,
    replay: Replay,
    begin: Callable[[], None] | None = None,
) -> Iterator[Any]:
    """An iterator over an indexed loader; its sampler has begun, and is recorded in ``order``.

    A loader does not let its sampler be replaced, and looks for it when iteration begins: so the
    attribute is replaced for that moment. Workers that persist keep what they found.
    """
    if is_reused(loader):
        kept = getattr(loader._iterator, "_index_sampler", None)
        if not isinstance(kept, Recorder):
            return begin_iteration()  # begun before anybody watched; nothing can be compared
        kept.prepare(order, replay, begin)
        iterator = begin_iteration()
        return iterator
    name = index_sampler_name(loader)
    original = loader.__dict__[name]
    kind = _StatefulRecorder if isinstance(original, Stateful) else Recorder
    recorder = loader.__dict__[name] = kind(original)
    recorder.prepare(order, replay, begin)
    try:
        iterator = begin_iteration()
    finally:
        loader.__dict__[name] = original
    if recorder.current is not None:
        recorder.current.read()
    recorder.forget()
    return iterator
