"""Verification in a process of its own, beside an application that has the database open.

Restoring, hashing and SQLite's check are minutes of work that would take the GIL, caches and memory
of the application.  In a child (`child`) they take none, and the child is also where the database's
files can be opened: closing one in the application's process would drop SQLite's locks.

It is killed when the last connection closes, so that its read mark does not keep SQLite from
removing the WAL.  When it has let go of that it gives way to everything else on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .child import Child, ChildError, serve
from .clock import SystemClock
from .errors import ReplicaError
from .store.opening import open_store
from .store.retrying import RetryingStore
from .store.settings import StoreSettings
from .verify import Verification, verify

__all__ = ["Job", "VerifyProcess", "main"]

#: Niceness of the child: the lowest priority there is.
_NICE: Final = 19


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the child is to do.

    Attributes:
        store: the replica.
        url: the same for people.
        database: the live database.
        directory: its state directory, where the scratch file goes too.
    """

    store: StoreSettings
    url: str
    database: Path
    directory: Path


class VerifyProcess:
    """One verification.  `kill` may be called from any thread.

    Args:
        job: what to do.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._child = Child(__name__)

    def run(self, timeout: float | None = None) -> Verification | None:
        """Verify, and wait for the outcome; what kept it from being done is an outcome as well.

        Args:
            timeout: seconds.

        Returns:
            None if it was killed.
        """
        try:
            found: Verification | str = self._child.run(self._job, timeout=timeout)
        except ChildError as error:
            if self._child.is_killed:
                return None
            found = str(error)
        if isinstance(found, Verification):
            return found
        return Verification(
            outcome="failed",
            replica=self._job.url,
            problem=f"not verified: {found}",
            time_ms=SystemClock().now_ms(),
        )

    def kill(self) -> None:
        """End it at once; it holds no lock on the database any more when this returns."""
        self._child.kill()

    def forget(self) -> None:
        """In a forked child, whose process it is not."""
        self._child.forget()


# --- the child ------------------------------------------------------------------------------------


def main() -> None:
    """Verify what the parent says."""
    serve(_verify, clean_up=True)


def _verify(job: Job, _ask: Callable[[], None]) -> Verification | str:
    """What was found, or what was in the way."""
    clock = SystemClock()
    try:
        with closing(RetryingStore(open_store(job.store, clock), clock)) as store:
            return verify(
                store,
                clock,
                job.directory / "verify",
                database=job.database,
                directory=job.directory,
                be_gentle=lambda: os.nice(_NICE),
            )
    except ReplicaError as error:
        return str(error)
