"""What was asked of stores, and what became of WALs, counted: by this process, since it began.

Filled by the threads that do it, read when somebody asks.  Knows no store and no database.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

__all__ = [
    "BUCKETS_S",
    "CheckpointCounts",
    "CheckpointMode",
    "Checkpoints",
    "Operation",
    "RequestCounts",
]

#: Upper bounds of the classes of `Operation.durations`, seconds; the last class has none.
BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """All attempts at one operation on stores of one type.

    Attributes:
        replica_type: "s3" or "file".
        operation: "GET", "PUT", "HEAD", "LIST", "DELETE" or "COPY".
        attempts: how often it was tried; also those that failed.
        n_bytes: bytes of content sent or received by those that succeeded.
        seconds: how long the attempts took together.
        durations: how many took up to each of `BUCKETS_S`, and longer than the last; no attempt is
            counted twice.
        errors: attempts that failed, by the store's code.  That an object is not there, or is there
            already, is an answer and no failure.
    """

    replica_type: str
    operation: str
    attempts: int
    n_bytes: int
    seconds: float
    durations: tuple[int, ...]
    errors: Mapping[str, int]


@dataclass(slots=True)
class _Sum:
    attempts: int = 0
    n_bytes: int = 0
    seconds: float = 0.0
    durations: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    errors: Counter[str] = field(default_factory=Counter)


class RequestCounts:
    """Counts operations and requests.  Thread-safe."""

    def __init__(self) -> None:
        # Guards the dictionaries and what is in them.
        self._lock = threading.Lock()
        self._operations: dict[tuple[str, str], _Sum] = {}
        self._requests: Counter[str] = Counter()

    def sent(self, request: str) -> None:
        """A request went out; ``request`` is its name in the store's API ("PutObject")."""
        with self._lock:
            self._requests[request] += 1

    def attempted(
        self, replica_type: str, operation: str, seconds: float, n_bytes: int, error: str | None
    ) -> None:
        """An attempt at an operation has ended.

        Args:
            n_bytes: of content that was transferred.
            error: the store's code if it failed.
        """
        with self._lock:
            found = self._operations.setdefault((replica_type, operation), _Sum())
            found.attempts += 1
            found.n_bytes += n_bytes
            found.seconds += seconds
            found.durations[bisect.bisect_left(BUCKETS_S, seconds)] += 1
            if error is not None:
                found.errors[error] += 1

    def add(self, operations: Iterable[Operation], requests: Mapping[str, int]) -> None:
        """Count what another process has counted."""
        with self._lock:
            for each in operations:
                found = self._operations.setdefault((each.replica_type, each.operation), _Sum())
                found.attempts += each.attempts
                found.n_bytes += each.n_bytes
                found.seconds += each.seconds
                for place, n in enumerate(each.durations):
                    found.durations[place] += n
                found.errors.update(each.errors)
            self._requests.update(requests)

    def operations(self) -> tuple[Operation, ...]:
        """What was counted so far, by type and operation."""
        with self._lock:
            return tuple(
                Operation(
                    replica_type=replica_type,
                    operation=operation,
                    attempts=found.attempts,
                    n_bytes=found.n_bytes,
                    seconds=found.seconds,
                    durations=tuple(found.durations),
                    errors=dict(found.errors),
                )
                for (replica_type, operation), found in sorted(self._operations.items())
            )

    def requests(self) -> dict[str, int]:
        """Requests to S3 stores so far, by their names in S3's API."""
        with self._lock:
            return dict(sorted(self._requests.items()))

    def forget(self) -> None:
        """In a forked child: nothing was counted in it, and nobody in it holds the lock."""
        self.__init__()  # type: ignore[misc]


#: SQLite's modes, by what they do to the WAL: its pages are copied into the main file (PASSIVE), it
#: is begun anew over the old one (RESTART), it is cut to nothing or removed (TRUNCATE).
CheckpointMode = Literal["PASSIVE", "RESTART", "TRUNCATE"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """All that did the same to the WAL of one database.

    Attributes:
        mode: what was done.  A TRUNCATE checkpoint is counted where it copies pages, and again
            where it cuts; nothing is counted where there was nothing to do.
        attempts: how often; also those that failed.
        errors: how often it was refused, because what the WAL holds could not be made safe first.
        seconds: of PASSIVE, for copying; of the others, for making safe what the WAL holds.
    """

    mode: CheckpointMode
    attempts: int = 0
    errors: int = 0
    seconds: float = 0.0


class CheckpointCounts:
    """Counts checkpoints of one database.  Thread-safe.

    Args:
        now: seconds from some start.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        # Guards the dictionary, which is read without it.
        self._lock = threading.Lock()
        self._found: dict[CheckpointMode, Checkpoints] = {
            mode: Checkpoints(mode=mode) for mode in ("PASSIVE", "RESTART", "TRUNCATE")
        }

    def ended(self, mode: CheckpointMode, began: float, *, failed: bool = False) -> None:
        """What had begun at that time is done, or refused."""
        with self._lock:
            found = self._found[mode]
            self._found[mode] = Checkpoints(
                mode=mode,
                attempts=found.attempts + 1,
                errors=found.errors + failed,
                seconds=found.seconds + self.now() - began,
            )

    @contextmanager
    def timed(self, mode: CheckpointMode) -> Iterator[None]:
        """Count what is done meanwhile; whatever it raises is a refusal."""
        began, failed = self.now(), True
        try:
            yield
            failed = False
        finally:
            self.ended(mode, began, failed=failed)

    def all(self) -> tuple[Checkpoints, ...]:
        """What was counted so far, by mode."""
        return tuple(self._found.values())
