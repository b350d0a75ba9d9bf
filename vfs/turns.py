"""Whose turn it is to write, among the threads of a process whose commits wait for the replica.

All that wait for one segment go on at the same moment, and most of them write again.  One gets
SQLite's write lock; with SQLite's own busy timeout the others sleep for fixed times and try again,
each of them many times.  Here they queue: whoever has committed wakes the one that came first.

Nobody is bound to that.  Writers of other processes, and those that do not wait for the replica,
take the lock when it is free, and hand nothing on; so the first in the queue also looks from time
to time, and all give up when their time has passed.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from walship.replica.clock import Clock

__all__ = ["Turns"]

#: How long the first in the queue sleeps before it looks at the lock, seconds, by how often it has
#: looked already.  Shorter than SQLite's pauses: it looks for all that are behind it.
_PAUSES_S: Final = (0.001, 0.001, 0.002, 0.002, 0.005)
#: How long one that is not first waits to be woken, seconds, before it looks all the same.
_BEHIND_S: Final = 0.05


class Turns:
    """The queue of one database.  Thread-safe: each step is one call of the deque's."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # One lock for each that waits, in order; it is released to wake its owner.
        self._waiting: deque[threading.Lock] = deque()

    def hand_on(self) -> None:
        """The write lock has just become free: wake the first; costs nothing if there is none."""
        if self._waiting:
            # Whoever it was may have given up at this moment.
            with contextlib.suppress(IndexError, RuntimeError):
                self._waiting.popleft().release()

    def busy_handler(self, patience_s: float) -> Callable[[int], bool]:
        """For ``Connection.set_busy_handler`` of one connection.

        Args:
            patience_s: seconds after which an attempt at the lock has failed.
        """
        turn = threading.Lock()
        turn.acquire()
        deadline = 0.0

        def wait(n_before: int) -> bool:
            nonlocal deadline
            now = self._clock.monotonic()
            if n_before == 0:
                deadline = now + patience_s
            if now >= deadline:
                return False
            if n_before == 0:
                self._waiting.append(turn)
            else:
                self._waiting.appendleft(turn)  # somebody was faster; it keeps its place
            is_first = n_before > 0 or len(self._waiting) == 1
            pause_s = _PAUSES_S[min(n_before, len(_PAUSES_S) - 1)] if is_first else _BEHIND_S
            woken = False
            try:
                woken = turn.acquire(timeout=min(pause_s, deadline - now))
            finally:
                if not woken:
                    self._leave(turn)
            return True

        return wait

    def _leave(self, turn: threading.Lock) -> None:
        try:
            self._waiting.remove(turn)
        except ValueError:  # it was woken at that very moment
            turn.acquire()
