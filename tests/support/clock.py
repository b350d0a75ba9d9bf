"""A clock that moves only when told to."""

from __future__ import annotations

import threading


class FakeClock:
    """Implements ``walship.replica.clock.Clock``.  Thread-safe.

    Attributes:
        sleeps: how long each ``sleep`` was asked to take, in order, seconds.
    """

    def __init__(self, now_ms: int = 1_736_000_000_000) -> None:
        self._lock = threading.Lock()
        self._now_ms = now_ms
        self._monotonic = 1000.0
        self.sleeps: list[float] = []

    def now_ms(self) -> int:
        with self._lock:
            return self._now_ms

    def monotonic(self) -> float:
        with self._lock:
            return self._monotonic

    def sleep(self, seconds: float) -> None:
        """Returns at once, ``seconds`` later."""
        with self._lock:
            self.sleeps.append(seconds)
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks."""
        with self._lock:
            self._monotonic += seconds
            self._now_ms += round(seconds * 1000)

    def set_wall(self, now_ms: int) -> None:
        """Let the wall clock alone jump, forwards or back."""
        with self._lock:
            self._now_ms = now_ms
