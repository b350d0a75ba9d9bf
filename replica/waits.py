"""Who waits for the replica, and for what: tickets, in the order in which they were drawn.

A ticket stands for everything committed before it was drawn.  It is *covered* once a segment with a
TXID holds all of that, and done once that TXID is acknowledged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from .errors import ReplicaError

__all__ = ["Waits", "countable"]


def countable(timeout: float | None) -> float | None:
    """A time-out in seconds that locks can take: None, without end, for what they cannot count."""
    return None if timeout is None or timeout > threading.TIMEOUT_MAX else timeout


@dataclass(slots=True)
class _Wait:
    """Somebody waits for what was committed before the ticket was drawn."""

    ticket: int
    future: Future[int]
    txid: int | None = None  # which holds it, once it is frozen


class Waits:
    """The open waits of one database in one process.  Thread-safe.

    Futures are resolved in the thread that reports; what their callbacks do must be quick.
    """

    def __init__(self) -> None:
        # Guards the fields below; never held while a future is resolved.
        self._lock = threading.Lock()
        self._ticket = 0
        self._waiting: list[_Wait] = []
        self._end: ReplicaError | None = None

    @property
    def ticket(self) -> int:
        """The newest ticket drawn."""
        return self._ticket

    @property
    def pending(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiting)

    def draw(self) -> Future[int]:
        """Wait for everything committed so far.

        Returns:
            The TXID that holds it, once that is acknowledged; ends with a `ReplicaError` if it can
            never be.
        """
        future: Future[int] = Future()
        with self._lock:
            end = self._end
            if end is None:
                self._ticket += 1
                self._waiting.append(_Wait(self._ticket, future))
        if end is not None:
            future.set_exception(end)
        return future

    def cover(self, ticket: int, txid: int) -> None:
        """Everything that tickets up to this one stand for is in TXIDs up to ``txid``."""
        with self._lock:
            for wait in self._waiting:
                if wait.txid is None and wait.ticket <= ticket:
                    wait.txid = txid

    def uncover(self) -> None:
        """What was to hold what is waited for is given up: none of it was acknowledged."""
        with self._lock:
            for wait in self._waiting:
                wait.txid = None

    def acknowledge(self, txid: int) -> None:
        """The replica has every TXID up to ``txid``."""
        self._finish(
            lambda wait: wait.txid is not None and wait.txid <= txid,
            lambda wait, future: future.set_result(wait.txid or 0),
        )

    def end(self, error: ReplicaError) -> None:
        """Nothing can be shipped any more; the first reason counts."""
        with self._lock:
            if self._end is not None:
                return
            self._end = error
        self._finish(lambda wait: True, lambda _, future: future.set_exception(error))

    def _finish(
        self, is_done: Callable[[_Wait], bool], resolve: Callable[[_Wait, Future[int]], None]
    ) -> None:
        with self._lock:
            done = [wait for wait in self._waiting if is_done(wait)]
            if not done:
                return
            self._waiting = [wait for wait in self._waiting if not is_done(wait)]
        for wait in done:
            if wait.future.set_running_or_notify_cancel():
                resolve(wait, wait.future)
