"""Calls that may never return, made in a thread of their own: whoever asks can give up.

A store whose machine has stopped answers nothing, and torch waits for it in code that no signal
and no time-out reaches.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any


class _Answer:
    """What comes of a call."""

    def __init__(self) -> None:
        self.came = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


_Question = tuple[Callable[..., Any], tuple[Any, ...], _Answer]


class Line:
    """One call at a time, from whichever thread."""

    def __init__(self) -> None:
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._guard = threading.Lock()
        # one that nobody waits for any more, and that may still come
        self._overdue: _Answer | None = None

    def call(self, call: Callable[..., Any], *args: Any, timeout_s: float) -> Any:
        """What the call returns.

        Raises:
            TimeoutError: nothing came; nor does it from now on, until that call has returned.
            Exception: whatever the call raises.
        """
        answer = _Answer()
        with self._guard:
            if self._overdue is not None and not self._overdue.came.is_set():
                raise TimeoutError("an earlier call has not returned")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_answer, args=(self._questions,), name="actckpt-store", daemon=True
                )
                self._thread.start()
                # the thread waits for nothing else, and must not outlive this
                weakref.finalize(self, self._questions.put, None)
        self._questions.put((call, args, answer))
        if not answer.came.wait(timeout_s):
            self._overdue = answer
            raise TimeoutError(f"a call has not returned within {timeout_s:g} s")
        if answer.error is not None:
            raise answer.error
        return answer.result


def _answer(questions: queue.SimpleQueue[_Question | None]) -> None:
    while (question := questions.get()) is not None:
        call, args, answer = question
        try:
            answer.result = call(*args)
        except BaseException as error:
            answer.error = error
        answer.came.set()
        del question, call, args, answer
