"""Time, as a parameter: the only module that asks the operating system for it."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """What the engine may know about time.  Thread-safe."""

    def now_ms(self) -> int:
        """Wall clock, milliseconds since the Unix epoch (UTC).  May jump."""

    def monotonic(self) -> float:
        """Seconds from some start; never goes back, counts suspended time where possible."""

    def sleep(self, seconds: float) -> None:
        """Block the calling thread for ``seconds`` (>= 0)."""


class SystemClock:
    """The real clock.  ``monotonic`` is CLOCK_BOOTTIME where the system has it."""

    _boottime = getattr(time, "CLOCK_BOOTTIME", None)

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        if self._boottime is not None:
            return time.clock_gettime(self._boottime)
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
