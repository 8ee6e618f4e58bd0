"""A run's journal as it is written: by a thread, so that no step waits for storage.

A line is with the operating system at most about `GATHER_S` after its step, and survives the end of
the process from then on; nothing waits until a device has it. Whatever goes wrong is said once, and
nothing more is taken until the next checkpoint.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Callable

from actckpt.checkpoint.files import Files
from actckpt.checkpoint.journal_file import cut_back, path_of
from actckpt.checkpoint.journal_lines import Head, Saved, head_line, saved_line

logger = logging.getLogger("actckpt")

# lines that come within this time are written together: a thread that wakes for each costs more
GATHER_S = 0.02
# a thread without work stays for so long, for a new one costs more than a line
_LINGER_S = 5.0
# an interpreter that exits waits for so long, of a run that was not closed
_EXIT_S = 2.0

_Work = bytes | Callable[[], None]
# an empty text: the thread is to end
_END = b""


class JournalWriter:
    """Writes into the journal of a directory. Its user holds the directory's lock.

    Attributes:
        rank: whose journal it is, of many.
        behind: whether a thread writes; False writes at once.
        spent_s: processor seconds of that thread.
    """

    def __init__(self, files: Files, directory: str, rank: int = 0) -> None:
        self._files = files
        self.rank = rank
        self._directory = directory
        self.behind = True
        self.spent_s = 0.0
        self._warned = False
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._guard = threading.Lock()
        # "" until the first line of a branch is written
        self._branch = ""
        # the file is another run's, and goes with the first line
        self._anew = True
        # from the first save on, or from that which the run goes on from
        self._begun = False
        self._saves: list[tuple[int, int]] = []
        # everything up to this step is dropped
        self._oldest = 0
        # of the thread
        self._fd = -1
        self._torn = self._failed = False
        self._queue: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def writes(self) -> bool:
        """Whether lines are taken now, in a process that holds the lock."""
        return self._begun and not self._failed

    def go_on(self, branch: str = "") -> None:
        """The run goes on in a branch that was written last; "" begins another one."""
        self._branch, self._anew, self._begun = branch, False, True

    def come_back(self, branch: str, serial: int, step: int, *, torn: bool) -> None:
        """As `go_on`, from a checkpoint.

        Args:
            torn: whether the file ends within a line.
        """
        self.go_on(branch)
        self._torn = torn
        # of a branch that goes on, that is there
        self._saves = [] if branch else [(serial, step)]

    def pause(self) -> None:
        """Nothing is written until the next save, where another branch begins."""
        self._branch, self._anew, self._begun = "", False, False

    def saving(self, serial: int, step: int) -> None:
        """A checkpoint is about to be made, by whichever thread."""
        with self._guard:
            self._saves.append((serial, step))
            if self._failed:
                self._branch, self._failed = "", False
            self._begun = True

    def append(self, step: int, line: Callable[[str], bytes], versions: dict[str, str]) -> None:
        """Writes the line of a step, and those that must come before it.

        Args:
            line: makes it, of a branch.
        """
        lines = []
        with self._guard:
            saves, self._saves = self._saves, []
            anew, self._anew = self._anew, False
            branch = self._branch
            if not branch:
                branch = self._branch = secrets.token_hex(4)
                lines.append(head_line(Head(branch, step - 1, versions)))
        if anew:
            self._do(self._remove)
        lines += [saved_line(Saved(branch, *save)) for save in saves]
        lines.append(line(branch))
        self._do(b"".join(lines))

    def retired(self, oldest: int, newest: int, serials: frozenset[int]) -> None:
        """Drops what the checkpoints that are left do not need, by whichever thread.

        What is kept is written anew for that: so a fifth of the steps must go at least.

        Args:
            oldest: the least step of one of them.
            newest: that of the last one.
            serials: theirs.
        """
        if not self._anew and 4 * (oldest - self._oldest) >= newest - oldest:
            self._oldest = oldest
            self._do(lambda: self._cut(oldest, serials))

    def flush(self, timeout_s: float | None = None) -> None:
        """Returns once everything is with the operating system, or after some time."""
        if self._process == os.getpid() and self._thread is not None:
            done = threading.Event()
            self._do(done.set)
            self._hurry.set()
            done.wait(timeout_s)

    def _end_thread(self) -> None:
        thread = self._thread
        if thread is not None:
            self._queue.put(_END)
            self._hurry.set()
            thread.join()

    def close(self) -> None:
        """Ends: the directory may be somebody else's from now on."""
        if self._process == os.getpid():
            self._end_thread()
            self._close_file()
        self._begin()
        self._anew = False

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0 and self._process == os.getpid():
            self._close_file()

    # ---- what the thread does

    def _do(self, work: _Work) -> None:
        if not self.behind:
            self._perform([work])
            return
        with self._guard:
            self._queue.put(work)
            if self._thread is None:
                # a daemon: nobody is to wait for the journal of a run that was not closed
                self._thread = threading.Thread(
                    target=self._run, name="actckpt-journal", daemon=True
                )
                _WRITERS.add(self)
                try:
                    self._thread.start()
                except RuntimeError as error:  # there can be no further thread
                    self._thread = None
                    self._fail(error)

    def _run(self) -> None:
        spent_s, written_s = 0.0, 0.0
        while True:
            work = []
            try:
                work.append(self._queue.get(timeout=_LINGER_S))
            except queue.Empty:
                with self._guard:
                    if self._queue.empty():
                        self._thread = None
                        return
                continue
            if (soon_s := written_s + GATHER_S - time.monotonic()) > 0:
                self._hurry.wait(soon_s)
            while not self._queue.empty():
                work.append(self._queue.get())
            self._hurry.clear()
            self._perform([w for w in work if w is not _END])
            written_s = time.monotonic()
            before_s, spent_s = spent_s, time.thread_time()
            self.spent_s += spent_s - before_s
            if _END in work:
                with self._guard:
                    if self._queue.empty():
                        self._thread = None
                        return

    def _perform(self, work: list[_Work]) -> None:
        lines: list[bytes] = []
        for item in work:
            if isinstance(item, bytes):
                lines.append(item)
                continue
            self._write(lines)
            lines = []
            item()
        self._write(lines)

    def _write(self, lines: list[bytes]) -> None:
        if not lines:
            return
        try:
            if self._fd < 0:
                self._fd = self._files.open_to_append(path_of(self._directory, self.rank))
            self._files.append(self._fd, (b"\n" if self._torn else b"") + b"".join(lines))
            self._torn = False
        except OSError as error:
            self._fail(error)

    def _remove(self) -> None:
        self._close_file()
        try:
            self._files.remove_tree(path_of(self._directory, self.rank))
        except OSError as error:
            self._fail(error)

    def _cut(self, oldest: int, serials: frozenset[int]) -> None:
        self._close_file()
        try:
            cut_back(self._files, self._directory, oldest, serials, self.rank)
        except (OSError, EOFError) as error:
            self._fail(error)

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._files.close_whatever(fd)

    def _fail(self, error: Exception) -> None:
        self._close_file()
        self._torn = self._failed = True
        if not self._warned:
            self._warned = True
            logger.warning(
                "actckpt: the journal in %s cannot be written: %s. Training and checkpoints go on; "
                "the steps since are not compared when they are made again",
                self._directory,
                error,
            )


_WRITERS: weakref.WeakSet[JournalWriter] = weakref.WeakSet()


def _flush_all() -> None:
    for writer in list(_WRITERS):
        writer.flush(_EXIT_S)


atexit.register(_flush_all)
