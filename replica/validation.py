"""Verification in the background: when it is due, what is done about the outcome.

In the process that uploads a thread waits for the time and for the child that does the work
(`verify_process`); it takes neither locks nor processor time of anybody.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from .clock import Clock
from .verify import LastVerified, Verification, in_words, last_verified, remember
from .verify_process import VerifyProcess
from .waits import countable

__all__ = ["Validation"]

log = logging.getLogger("walship.validation")

#: How often it is looked whether a verification is due, at most, seconds.
_LOOK_S: Final = 5.0
#: How long after opening the first one is due, if the interval is longer; where local state is lost
#: at each start, so that there is no time of the last one, an interval alone may never end.
_FIRST_S: Final = 300.0
#: How long after one that could not be done the next is due, if the interval is longer.
_AGAIN_S: Final = 600.0


class Validation:
    """Verifies one database's replica on a schedule.  Public methods may be called by any thread.

    Args:
        name: of the database, for the log.
        directory: its state directory, where the outcome is kept.
        replica: URL of the replica.
        clock: tells the time.
        interval_s: seconds from one verification to the next; 0 for none.
        may_run: whether it is this process that has to do it.
        make: makes the process for one verification.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        replica: str,
        clock: Clock,
        interval_s: float,
        *,
        may_run: Callable[[], bool],
        make: Callable[[], VerifyProcess],
    ) -> None:
        self._name = name
        self._directory = directory
        self._replica = replica
        self._clock = clock
        self._interval_s = interval_s
        self._may_run = may_run
        self._make = make
        self._begun_ms = clock.now_ms()
        self._wake = threading.Event()
        self._stopped = False
        self._paused = False
        # Guards `_running` and `_paused`.
        self._lock = threading.Lock()
        self._running: set[VerifyProcess] = set()
        self._callbacks: list[Callable[[Verification], object]] = []

    def start(self) -> None:
        """Begin with the schedule, if there is one, in a thread of its own (a daemon)."""
        if self._interval_s > 0:
            name = f"walship:{self._name}:verify"
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def on_failed(self, callback: Callable[[Verification], object]) -> None:
        """Have a function called, in the thread that verifies, with each outcome that is bad."""
        self._callbacks.append(callback)

    def last(self) -> LastVerified | None:
        """How the last verification ended, whoever did it; None if there was none."""
        return last_verified(self._directory, self._replica)

    def verify(self, timeout: float | None = None) -> Verification | None:
        """Verify now, and wait for the outcome.

        Args:
            timeout: seconds; then the outcome is "failed".

        Returns:
            None if the database was closed meanwhile.
        """
        timeout = countable(timeout)
        process = self._make()
        with self._lock:
            if self._paused or self._stopped:
                return None
            self._running.add(process)
        try:
            found = process.run(timeout)
        finally:
            with self._lock:
                self._running.discard(process)
        if found is not None:
            remember(self._directory, found)
            self._tell(found)
        return found

    def pause(self) -> None:
        """End what is under way, and begin nothing until `resume`: the last connection closes."""
        with self._lock:
            self._paused = True
            running = list(self._running)
        for process in running:
            process.kill()

    def resume(self) -> None:
        """A connection is there again; what was ended is due at once."""
        self._paused = False

    def stop(self) -> None:
        """End for good; waits for nothing but the end of a child that is killed."""
        self._stopped = True
        self._wake.set()
        self.pause()

    def forget(self) -> None:
        """In a forked child, which has neither the thread nor the process."""
        self._stopped = True
        self._lock = threading.Lock()
        for process in self._running:
            process.forget()
        self._running = set()

    def _run(self) -> None:
        while not self._stopped:
            wait_s = min(self.due_in_s(), _LOOK_S)
            if wait_s > 0 or self._paused or not self._may_run():
                self._wake.wait(max(wait_s, min(self._interval_s, _LOOK_S) / 10))
                continue
            try:
                self.verify()
            except Exception:
                log.exception("%s: unexpected error in the verification", self._name)
                self._wake.wait(_LOOK_S)

    def due_in_s(self) -> float:
        """Seconds until the next verification is due; not positive if it is."""
        last = self.last()
        if last is None:
            before_ms, wait_s = self._begun_ms, min(self._interval_s, _FIRST_S)
        else:
            before_ms = last.time_ms
            failed = last.outcome == "failed"
            wait_s = min(self._interval_s, _AGAIN_S) if failed else self._interval_s
        since_s = (self._clock.now_ms() - before_ms) / 1000
        # A clock that was set back must not put it off.
        return wait_s - since_s if since_s >= 0 else 0.0

    def _tell(self, found: Verification) -> None:
        if found.ok:
            log.info("%s: verified: %s", self._name, in_words(found))
            return
        if found.outcome == "failed":
            log.warning("%s: %s", self._name, found.problem)
            return
        log.error("%s: the replica is not good: %s", self._name, in_words(found))
        for callback in list(self._callbacks):
            try:
                callback(found)
            except Exception:
                log.exception("%s: on_verify_failed raised", self._name)
