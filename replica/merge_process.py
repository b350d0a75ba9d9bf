"""Large merges in a process of their own, so that the application does not feel them.

Merging runs Python code for as long as it takes, and so does sending a large file; in a thread of
the application both would make its commits wait for the GIL.  The child (`child`) has a low
priority, and asks before it changes the replica: the lease is held, and proven, by its parent.

There is nobody in it who has the database open, so a snapshot of the newest state can be made of
the database's own pages (`snapshots`).  Where that is not possible, it is a merge as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from .child import Child, ChildError, Slots, serve
from .counts import Operation, RequestCounts
from .errors import ClosedError, ReplicaError
from .host import Host
from .live import NotComparable
from .merging import Made, Merge, carry_out
from .snapshots import snapshot_live
from .store.settings import StoreSettings

__all__ = ["MergeProcess", "main"]

log = logging.getLogger("walship.levels")

#: Niceness of the child.  The application goes first; but on a machine that is never idle merging
#: must get on as well, and with this it has a tenth of what a busy process has.
_NICE: Final = 10


@dataclass(frozen=True, slots=True)
class _Task:
    job: Merge
    store: StoreSettings
    database: Path
    directory: Path


@dataclass(frozen=True, slots=True)
class _Outcome:
    result: Made | ReplicaError | OSError
    # Why the database's own pages were not used, if they were to be.
    not_live: str
    operations: tuple[Operation, ...]
    requests: dict[str, int]


class MergeProcess:
    """Merges of one database.  `run` is for one thread at a time, the rest for any.

    Args:
        store: the replica.
        slots: of this process.
        counts: takes the numbers of the child's requests.
        database: the file; snapshots of the newest state are made of its own pages.
        directory: its state directory.
    """

    def __init__(
        self,
        store: StoreSettings,
        slots: Slots,
        counts: RequestCounts,
        *,
        database: Path,
        directory: Path,
    ) -> None:
        self._store = store
        self._slots = slots
        self._counts = counts
        self._database = database
        self._directory = directory
        self._child: Child | None = None
        # Set before the child is ended, looked at when there is one.
        self._has_left = False
        self._reads_database = False

    def run(
        self, job: Merge, *, look_up: Callable[[], object], may_put: Callable[[], object]
    ) -> Made:
        """As `merging.carry_out`.

        Raises:
            ChildError: the child could not be started, or ended without an answer.
            ClosedError: it was killed.
        """
        with self._slots.taken(look_up):
            try:
                outcome = self._run(job, look_up, may_put)
            except _Left:
                # The database is being closed, and might be opened again.
                outcome = self._run(replace(job, is_newest=False), look_up, may_put)
        if outcome.not_live:
            log.info("%s: the snapshot is merged: %s", self._database, outcome.not_live)
        self._counts.add(outcome.operations, outcome.requests)
        if isinstance(outcome.result, Made):
            return outcome.result
        raise outcome.result

    def _run(
        self, job: Merge, look_up: Callable[[], object], may_put: Callable[[], object]
    ) -> _Outcome:
        self._reads_database = job.is_newest
        child = self._child = Child(__name__, nice=_NICE)
        try:
            look_up()  # whoever kills it has made this raise before
            if job.is_newest and self._has_left:
                raise _Left
            task = _Task(job, self._store, self._database, self._directory)
            outcome: _Outcome = child.run(task, permit=may_put)
        except ChildError as error:
            if not child.is_killed:
                raise
            look_up()
            raise (_Left() if job.is_newest else ClosedError("the merge was ended")) from error
        finally:
            self._child = None
        return outcome

    def leave_database(self) -> None:
        """End what reads the database, which is merged then of what the replica holds: there is no
        lock on the database any more when this returns, until `enter_database`."""
        self._has_left = True
        child = self._child
        if child is not None and self._reads_database:
            child.kill(wait=True)

    def enter_database(self) -> None:
        """The database may be read again."""
        self._has_left = False

    def kill(self, *, wait: bool) -> None:
        """End what is under way.

        Args:
            wait: until it is gone.
        """
        child = self._child
        if child is not None:
            child.kill(wait=wait)

    def forget(self) -> None:
        """In a forked child, whose process it is not."""
        child = self._child
        if child is not None:
            child.forget()


class _Left(Exception):
    """The child was ended so that the database is left alone."""


# --- the child ------------------------------------------------------------------------------------


def main() -> None:
    """Merge what the parent says.  Once that is gone nothing may be sent any more, and what was
    merged is removed by the next process that uploads."""
    serve(_merge, clean_up=False)


def _merge(task: _Task, ask: Callable[[], None]) -> _Outcome:
    host = Host()
    result: Made | ReplicaError | OSError | None = None
    not_live = ""
    try:
        with closing(host.open_store(task.store)) as store:
            if task.job.is_newest:
                try:
                    result = snapshot_live(
                        task.job,
                        store,
                        host.files,
                        host.clock,
                        database=task.database,
                        directory=task.directory,
                        may_put=ask,
                    )
                except NotComparable as error:
                    not_live = str(error)
            if result is None:
                result = carry_out(task.job, store, host.files, may_put=ask)
    except (ReplicaError, OSError) as error:
        result = error
    return _Outcome(result, not_live, host.requests.operations(), host.requests.requests())
