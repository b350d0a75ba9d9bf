"""An object store in memory, with S3's layout and promises, whose objects can be looked at."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from walship.replica.clock import Clock, SystemClock
from walship.replica.errors import ObjectNotFound, PreconditionFailed, StoreUnavailable
from walship.replica.store.base import Body, ObjectInfo, Version
from walship.replica.store.timestamps import TIMESTAMP_METADATA, format_timestamp


@dataclass(frozen=True, slots=True)
class Object:
    """One object."""

    body: bytes
    modified_ms: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def etag(self) -> str:
        return hashlib.md5(self.body, usedforsecurity=False).hexdigest()


class MemoryStore:
    """Implements ``walship.replica.store.base.ObjectStore``.

    Args:
        objects: its content, which it changes.
        clock: the store's own; the real one by default.

    Attributes:
        away: every request fails, without effect.
        lost: how many of the next puts take effect and fail nevertheless.
        latency: how long the put of a key takes, seconds.
        before, after: called with the key and the object before and after each change (None: it is
            removed).
    """

    logical_times = False

    def __init__(
        self,
        objects: dict[str, Object],
        url: str = "s3://bucket/app",
        *,
        clock: Clock | None = None,
    ) -> None:
        self.objects = objects
        self.url = url
        self._clock = clock or SystemClock()
        self.away = False
        self.lost = 0
        self.latency: Callable[[str], float] = lambda key: 0.0
        self.before: Callable[[str, Object | None], None] = lambda key, made: None
        self.after: Callable[[str, Object | None], None] = lambda key, made: None
        self._lock = threading.RLock()

    def level_prefix(self, level: int) -> str:
        return f"{level:04x}/"

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
        self._reach()
        content = body.read_bytes() if isinstance(body, Path) else bytes(body)
        entries = dict(metadata or {})
        if timestamp_ms is not None:
            entries[TIMESTAMP_METADATA] = format_timestamp(timestamp_ms)
        made = Object(content, self._clock.now_ms(), entries)
        self.before(key, made)
        self._clock.sleep(self.latency(key))
        with self._lock:
            found = self.objects.get(key)
            if if_absent and found is not None:
                raise PreconditionFailed(f"{key} exists already")
            if if_match is not None and (found is None or found.etag != if_match):
                raise PreconditionFailed(f"{key} is another one")
            self.objects[key] = made
            lost, self.lost = self.lost > 0, max(0, self.lost - 1)
        self.after(key, made)
        if lost:
            raise StoreUnavailable("the answer got lost", ambiguous=True)
        return _info(key, made)

    def copy(self, source: str, target: str) -> ObjectInfo:
        found = self._find(source)
        made = Object(found.body, self._clock.now_ms(), found.metadata)
        self.before(target, made)
        with self._lock:
            self.objects[target] = made
        self.after(target, made)
        return _info(target, made)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        body = self._find(key).body
        return body[start:] if length is None else body[start : start + length]

    def read(self, key: str, *, unless_etag: str | None = None) -> Version | None:
        found = self._find(key)
        if found.etag == unless_etag:
            return None
        return Version(found.body, found.etag, found.modified_ms, self._clock.now_ms())

    def head(self, key: str) -> ObjectInfo:
        return _info(key, self._find(key))

    def list(self, prefix: str, start_after: str | None = None) -> Iterator[ObjectInfo]:
        self._reach()
        with self._lock:
            keys = sorted(k for k in self.objects if k.startswith(prefix))
        for key in keys:
            if start_after is None or key > start_after:
                found = self.objects[key]
                yield ObjectInfo(key, len(found.body), found.modified_ms, found.etag)

    def delete(self, keys: Sequence[str]) -> None:
        self._reach()
        for key in keys:
            self.before(key, None)
            with self._lock:
                self.objects.pop(key, None)
            self.after(key, None)

    def close(self) -> None:
        """Nothing is held open."""

    def _reach(self) -> None:
        if self.away:
            raise StoreUnavailable("the store is away")

    def _find(self, key: str) -> Object:
        self._reach()
        with self._lock:
            found = self.objects.get(key)
        if found is None:
            raise ObjectNotFound(f"{key} does not exist")
        return found


def _info(key: str, found: Object) -> ObjectInfo:
    return ObjectInfo(key, len(found.body), found.modified_ms, found.etag, found.metadata)
