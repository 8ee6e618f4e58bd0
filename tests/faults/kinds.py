"""The faults, each at one system call: it ends the process, fails, does less, is interrupted."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from tests.system_calls import Call, Make

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE, errno.EINTR)
# those that fail on a device that is full, or was switched to read-only
CHANGING = ("write", "fsync", "mkdir", "rename", "unlink", "rmdir")


class Fault(Protocol):
    """Around system calls, for `Watched`; counts how often it fired."""

    at: int
    fired: int

    def __call__(self, call: Call, make: Make) -> Any: ...

    @property
    def harmless(self) -> bool:
        """Whether a save must succeed all the same."""
        ...


@dataclass(slots=True)
class Fails:
    """One call reports an error.

    Args:
        late: only after it was made.
        on: the calls after it fail as well, as far as they change something.
    """

    at: int
    code: int
    late: bool = False
    on: bool = False
    fired: int = 0

    @property
    def harmless(self) -> bool:
        return self.code == errno.EINTR and not self.late

    def __call__(self, call: Call, make: Make) -> Any:
        hit = call.number == self.at
        if not (hit or (self.on and call.number > self.at and call.name in CHANGING)):
            return make(call)
        self.fired += hit
        # a descriptor is gone even where closing it reports an error
        if call.name == "close":
            make(call)
        elif self.late:
            left = make(call)
            if call.name == "open":  # nobody will close it
                os.close(left)
        raise OSError(self.code, os.strerror(self.code), str(call.args[0]))


@dataclass(slots=True)
class Short:
    """One call reads or writes less than it was given."""

    at: int
    fired: int = 0

    @property
    def harmless(self) -> bool:
        return True

    def __call__(self, call: Call, make: Make) -> Any:
        if call.number != self.at or call.name not in ("write", "readinto"):
            return make(call)
        self.fired += 1
        fd, data, *offset = call.args
        return make(Call(call.number, call.name, (fd, data[: max(1, len(data) // 2)], *offset)))


@dataclass(slots=True)
class Kills:
    """The process ends before one call, after saying so on a descriptor."""

    at: int
    tell: int
    fired: int = 0

    @property
    def harmless(self) -> bool:
        return False

    def __call__(self, call: Call, make: Make) -> Any:
        if call.number == self.at:
            os.write(self.tell, b"fired\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return make(call)


def errors(names: list[str]) -> Iterator[Fails | Short]:
    """Every error of every call of a process that makes these calls, kind by kind."""
    everywhere = range(len(names))
    changing = [at for at in everywhere if names[at] in CHANGING]
    yield from (Short(at) for at in everywhere if names[at] in ("write", "readinto"))
    for code in CODES:
        yield from (Fails(at, code) for at in everywhere)
        yield from (Fails(at, code, late=True) for at in everywhere)
    for code in (errno.ENOSPC, errno.EIO, errno.EROFS):
        yield from (Fails(at, code, on=True) for at in changing)
