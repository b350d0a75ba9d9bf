"""Large merges in a process of their own, so that the application does not feel them.

Merging runs Python code for as long as it takes, and so does sending a large file; in a thread of
the application both would make its commits wait for the GIL.  The child (`child`) has a low
priority, and asks before it changes the replica: the lease is held, and proven, by its parent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from .child import Child, ChildError, Slots, serve
from .counts import Operation, RequestCounts
from .errors import ClosedError, ReplicaError
from .host import Host
from .merging import Made, Merge, carry_out
from .store.settings import StoreSettings

__all__ = ["MergeProcess", "main"]

#: Niceness of the child.  The application goes first; but on a machine that is never idle merging
#: must get on as well, and with this it has a tenth of what a busy process has.
_NICE: Final = 10


@dataclass(frozen=True, slots=True)
class _Task:
    job: Merge
    store: StoreSettings


@dataclass(frozen=True, slots=True)
class _Outcome:
    result: Made | ReplicaError | OSError
    operations: tuple[Operation, ...]
    requests: dict[str, int]


class MergeProcess:
    """Merges of one database.  `run` is for one thread at a time, the rest for any.

    Args:
        store: the replica.
        slots: of this process.
        counts: takes the numbers of the child's requests.
    """

    def __init__(self, store: StoreSettings, slots: Slots, counts: RequestCounts) -> None:
        self._store = store
        self._slots = slots
        self._counts = counts
        self._child: Child | None = None

    def run(
        self, job: Merge, *, look_up: Callable[[], object], may_put: Callable[[], object]
    ) -> Made:
        """As `merging.carry_out`.

        Raises:
            ChildError: the child could not be started, or ended without an answer.
            ClosedError: it was killed.
        """
        with self._slots.taken(look_up):
            child = self._child = Child(__name__, nice=_NICE)
            try:
                look_up()  # whoever kills it has made this raise before
                outcome: _Outcome = child.run(_Task(job, self._store), permit=may_put)
            except ChildError as error:
                if child.is_killed:
                    raise ClosedError("the merge was ended") from error
                raise
            finally:
                self._child = None
        self._counts.add(outcome.operations, outcome.requests)
        if isinstance(outcome.result, Made):
            return outcome.result
        raise outcome.result

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


# --- the child ------------------------------------------------------------------------------------


def main() -> None:
    """Merge what the parent says.  Once that is gone nothing may be sent any more, and what was
    merged is removed by the next process that uploads."""
    serve(_merge, clean_up=False)


def _merge(task: _Task, ask: Callable[[], None]) -> _Outcome:
    host = Host()
    result: Made | ReplicaError | OSError
    try:
        with closing(host.open_store(task.store)) as store:
            result = carry_out(task.job, store, host.files, may_put=ask)
    except (ReplicaError, OSError) as error:
        result = error
    return _Outcome(result, host.requests.operations(), host.requests.requests())
