"""A store that tries again: same interface, with back-off, jitter and a deadline around another.

What is worth trying again is decided by the inner store (``StoreError.retryable``).  A conditional
write is special: when an attempt failed without a clear answer and a later one finds the key taken
(or the version to replace gone), the object may be the caller's own or somebody else's.  This
wrapper does not guess: ``PreconditionFailed`` is raised with ``ambiguous`` true, and the caller
compares the bytes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

from walship.replica.clock import Clock
from walship.replica.errors import PreconditionFailed, StoreError

from .base import Body, ObjectInfo, ObjectStore, Version
from .forwarding import ForwardingStore

__all__ = ["RetryingStore"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: More doublings than this change nothing, whatever the first pause is.
_MAX_DOUBLINGS: Final = 30


class RetryingStore(ForwardingStore):
    """Repeats what failed in passing.  Thread-safe if ``store`` is.

    Args:
        store: does the work; closed with this one.
        clock: for pauses and the deadline.
        rng: source of the jitter; its own by default.
        attempts: tries per call, at least 1.
        deadline_s: seconds per call after which no further attempt begins, or None for no limit.
            An attempt that is under way is not cut short.
        first_pause_s: upper bound of the first pause; it doubles with each attempt.
        max_pause_s: upper bound of any pause.
    """

    def __init__(
        self,
        store: ObjectStore,
        clock: Clock,
        rng: random.Random | None = None,
        *,
        attempts: int = 6,
        deadline_s: float | None = 60.0,
        first_pause_s: float = 0.1,
        max_pause_s: float = 5.0,
    ) -> None:
        if attempts < 1:
            raise ValueError("attempts must be at least 1")
        super().__init__(store)
        self._clock = clock
        self._rng = rng if rng is not None else random.Random()
        self._attempts = attempts
        self._deadline_s = deadline_s
        self._first_pause_s = first_pause_s
        self._max_pause_s = max_pause_s

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
        attempts = _Attempts(self, f"put {key}")
        ambiguous = False
        while True:
            try:
                return self._store.put(
                    key,
                    body,
                    timestamp_ms=timestamp_ms,
                    metadata=metadata,
                    if_absent=if_absent,
                    if_match=if_match,
                )
            except PreconditionFailed as error:
                if not ambiguous:
                    raise
                raise PreconditionFailed(
                    f"{error} (an earlier attempt was not answered: it may be that one's)",
                    ambiguous=True,
                    code=error.code,
                ) from error
            except StoreError as error:
                ambiguous = ambiguous or error.ambiguous
                if not attempts.again(error):
                    error.ambiguous = ambiguous
                    raise

    def copy(self, source: str, target: str) -> ObjectInfo:
        return self._repeat(f"copy {source}", lambda: self._store.copy(source, target))

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return self._repeat(f"get {key}", lambda: self._store.get(key, start, length))

    def read(self, key: str, *, unless_etag: str | None = None) -> Version | None:
        return self._repeat(f"read {key}", lambda: self._store.read(key, unless_etag=unless_etag))

    def head(self, key: str) -> ObjectInfo:
        return self._repeat(f"head {key}", lambda: self._store.head(key))

    def list(self, prefix: str, start_after: str | None = None) -> Iterator[ObjectInfo]:
        attempts = _Attempts(self, f"list {prefix}")
        while True:
            try:
                for info in self._store.list(prefix, start_after):
                    start_after = info.key  # where the next attempt goes on
                    yield info
                return
            except StoreError as error:
                if not attempts.again(error):
                    raise

    def delete(self, keys: Sequence[str]) -> None:
        self._repeat(f"delete {len(keys)} keys", lambda: self._store.delete(keys))

    def _repeat(self, what: str, attempt: Callable[[], _T]) -> _T:
        attempts = _Attempts(self, what)
        while True:
            try:
                return attempt()
            except StoreError as error:
                if not attempts.again(error):
                    raise


class _Attempts:
    """The tries of one call: how many there were, and when the last one may begin."""

    def __init__(self, owner: RetryingStore, what: str) -> None:
        self._owner = owner
        self._what = what
        self._made = 0
        self._began = owner._clock.monotonic()

    def again(self, error: StoreError) -> bool:
        """After a failure: pause and return True, or return False if it was the last attempt."""
        owner = self._owner
        self._made += 1
        if not error.retryable or self._made >= owner._attempts:
            return False
        bound = min(
            owner._max_pause_s,
            owner._first_pause_s * 2.0 ** min(self._made - 1, _MAX_DOUBLINGS),
        )
        # Half fixed, half random: clients that failed together do not come back together, and
        # none comes back at once.
        pause = bound * (0.5 + 0.5 * owner._rng.random())
        if owner._deadline_s is not None:
            left = self._began + owner._deadline_s - owner._clock.monotonic()
            if pause > left:
                return False
        _log.debug("store-retry what=%s attempt=%d error=%s", self._what, self._made, error)
        owner._clock.sleep(pause)
        return True
