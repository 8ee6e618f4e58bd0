"""How ranks agree on a name for what they say to one another, which nobody has used before.

A key-value store may outlive those that spoke through it: torchrun gives a job that it starts again
the store of the attempt before, and a process may leave its group and found another. What was said
then is still there, under the very keys that are asked for now.

Every rank says hello under a key of its own, with a word that it has just drawn. Rank 0 answers
under that word, where nobody else ever answered, and until every rank has said that it heard it: a
hello that it finds first may be of the attempt before.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

# between two looks of rank 0
_LEAST_S, _MOST_S = 0.001, 0.05

Call = Callable[..., Any]


class Hello:
    """What a rank other than 0 does.

    Args:
        call: calls a method of a store, and gives up in its own way.
        store: through which they meet.
        rank: this one's.
    """

    def __init__(self, call: Call, store: Any, rank: int) -> None:
        self._call, self._store, self._rank = call, store, rank
        self._word = secrets.token_hex(8)
        call(store.set, f"hello/{rank}", self._word)

    def answer(self) -> str | None:
        """The name, once rank 0 has said it."""
        key = f"welcome/{self._word}"
        if not self._call(self._store.check, [key]):
            return None
        name: str = self._call(self._store.get, key).decode()
        self._call(self._store.set, f"heard/{name}/{self._rank}", "")
        return name


def welcome(store: Any, ranks: range, name: str, ended: Callable[[float], bool]) -> None:
    """Answers every rank, until each has heard it.

    Args:
        ranks: of the others.
        ended: waits so many seconds; whether this is to end.

    Raises:
        RuntimeError: the store has ended.
    """
    met: dict[int, str] = {}
    left, pause_s, last_s = set(ranks), _LEAST_S, time.monotonic()
    while left:
        for rank in sorted(left):
            if store.check([f"heard/{name}/{rank}"]):
                left.discard(rank)
            elif store.check([f"hello/{rank}"]):
                word = store.get(f"hello/{rank}").decode()
                if met.get(rank) != word:
                    met[rank] = word
                    store.set(f"welcome/{word}", name)
                    pause_s, last_s = _LEAST_S, time.monotonic()
        if left and ended(pause_s):
            return
        # one that comes an hour later is still answered, at little cost
        pause_s = min(2 * pause_s, _MOST_S if time.monotonic() - last_s < 60 else 1.0)
