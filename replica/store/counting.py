"""A store whose operations are counted: same interface, each attempt noted with its time and size.

It stands directly before the real one, below whatever repeats requests: what counts is what the
store has to do, and what is paid for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from walship.replica.clock import Clock
from walship.replica.counts import RequestCounts
from walship.replica.errors import ObjectNotFound, PreconditionFailed, StoreError

from .base import Body, ObjectInfo, ObjectStore, Version
from .forwarding import ForwardingStore

__all__ = ["CountingStore"]

_T = TypeVar("_T")


class CountingStore(ForwardingStore):
    """Counts what is asked of a store.  Thread-safe if ``store`` is.

    Args:
        store: does the work; closed with this one.
        replica_type: "s3" or "file", under which it is counted.
        counts: takes the numbers.
        clock: measures durations.
    """

    def __init__(
        self, store: ObjectStore, replica_type: str, counts: RequestCounts, clock: Clock
    ) -> None:
        super().__init__(store)
        self._replica_type = replica_type
        self._counts = counts
        self._clock = clock

    def put(
        self,
        key: str,
        body: Body,
        *,
        timestamp_ms: int | None = None,
        metadata: Mapping[str, str] | None = None,
        if_absent: bool = False,
        if_match: str | None = None,
    ) -> ObjectInfo:
        return self._count(
            "PUT",
            lambda: self._store.put(
                key,
                body,
                timestamp_ms=timestamp_ms,
                metadata=metadata,
                if_absent=if_absent,
                if_match=if_match,
            ),
            lambda info: info.size_bytes,
        )

    def copy(self, source: str, target: str) -> ObjectInfo:
        return self._count("COPY", lambda: self._store.copy(source, target))

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return self._count("GET", lambda: self._store.get(key, start, length), len)

    def read(self, key: str, *, unless_etag: str | None = None) -> Version | None:
        return self._count(
            "GET",
            lambda: self._store.read(key, unless_etag=unless_etag),
            lambda version: 0 if version is None else len(version.body),
        )

    def head(self, key: str) -> ObjectInfo:
        return self._count("HEAD", lambda: self._store.head(key))

    def list(self, prefix: str, start_after: str | None = None) -> Iterator[ObjectInfo]:
        # What the caller does between two objects takes no time of the store's.
        seconds = 0.0
        error: str | None = None
        found = self._store.list(prefix, start_after)
        try:
            while True:
                began = self._clock.monotonic()
                try:
                    info = next(found, None)
                except StoreError as failure:
                    error = _code_of(failure)
                    raise
                finally:
                    seconds += self._clock.monotonic() - began
                if info is None:
                    return
                yield info
        finally:
            self._counts.attempted(self._replica_type, "LIST", seconds, 0, error)

    def delete(self, keys: Sequence[str]) -> None:
        self._count("DELETE", lambda: self._store.delete(keys))

    def _count(
        self, operation: str, attempt: Callable[[], _T], size: Callable[[_T], int] = lambda _: 0
    ) -> _T:
        error: str | None = None
        n_bytes = 0
        began = self._clock.monotonic()
        try:
            result = attempt()
            n_bytes = size(result)
            return result
        except StoreError as failure:
            error = _code_of(failure)
            raise
        finally:
            seconds = self._clock.monotonic() - began
            self._counts.attempted(self._replica_type, operation, seconds, n_bytes, error)


def _code_of(failure: StoreError) -> str | None:
    """What failed; None for an answer that a working store gives."""
    if isinstance(failure, ObjectNotFound | PreconditionFailed):
        return None
    return failure.code or type(failure).__name__
