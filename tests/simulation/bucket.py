"""A replica's store in the simulation: what it holds, and how its answers go astray.

The objects change atomically, one request after the other; what a seed decides is when a request
takes effect (never, now, long after its client gave up, twice) and what its client hears of it.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from walship.replica.errors import (
    ObjectNotFound,
    PreconditionFailed,
    StoreError,
    StoreUnavailable,
)
from walship.replica.store.base import Body, ObjectInfo, Version

from .runtime import Killed, Owner, Runtime

__all__ = ["Bucket", "Client", "Weather"]

_T = TypeVar("_T")

#: Wall clock at the beginning of every run, ms since the epoch.
START_MS = 1_750_000_000_000


@dataclass
class Weather:
    """How requests fare: chances from 0 to 1.

    Attributes:
        lost: the request never arrives, and its client waits until its time is over.
        silent: it is done, and the answer never arrives.
        late: the client hears nothing, and the request takes effect long after.
        twice: it takes effect now, and once more later.
        refused: an error that says so, with or without effect.
        slow: the answer takes seconds.
        latest_s: the longest that a late request takes, seconds.
        timeout_s: how long a client waits for an answer, seconds.
    """

    lost: float = 0.0
    silent: float = 0.0
    late: float = 0.0
    twice: float = 0.0
    refused: float = 0.0
    slow: float = 0.0
    latest_s: float = 60.0
    timeout_s: float = 10.0

    @property
    def fair(self) -> bool:
        return not (self.lost or self.silent or self.late or self.refused)


@dataclass(frozen=True)
class _Object:
    body: bytes
    etag: str
    modified_ms: int
    metadata: Mapping[str, str]


@dataclass
class Bucket:
    """The objects of one replica.

    Attributes:
        directory: behave like a replica in a directory: times are those given, no metadata.
        conditional: "yes"; "ignored", as some stores do; or "refused" (501).
        skew_s: how wrong the store's clock is, seconds.
        page: keys in one page of a listing.
        everything: digest of the newest content under each key, also of those deleted since.
        watch: called for each object that lands.
        straggler: whose next segment does not land before `release`.
        stopped: called when that is on its way.
    """

    runtime: Runtime
    rng: random.Random
    directory: bool = False
    conditional: str = "yes"
    skew_s: float = 0.0
    page: int = 1000
    weather: Weather = field(default_factory=Weather)
    away_until: float = 0.0
    objects: dict[str, _Object] = field(default_factory=dict)
    everything: dict[str, str] = field(default_factory=dict)
    under_way: dict[str, int] = field(default_factory=dict)
    pending: dict[int, tuple[str, Callable[[], object]]] = field(default_factory=dict)
    n_requests: int = 0
    watch: Callable[[str, bytes, Owner], None] = lambda key, body, who: None
    straggler: Owner | None = None
    stopped: Callable[[Owner], None] = lambda who: None
    held: list[tuple[str, Callable[[], object]]] = field(default_factory=list)
    _seq: int = 0

    # -- effects ------------------------------------------------------------------------------

    def now_ms(self) -> int:
        """By the store's clock."""
        return START_MS + round((self.runtime.now + self.skew_s) * 1000)

    def put(
        self,
        key: str,
        body: bytes,
        timestamp_ms: int | None,
        metadata: Mapping[str, str],
        if_absent: bool,
        if_match: str | None,
        who: Owner | None,
    ) -> ObjectInfo:
        found = self.objects.get(key)
        if (if_absent or if_match is not None) and self.conditional == "refused":
            raise StoreError(f"put {key}: 501", code="NotImplemented")
        if self.conditional == "yes":
            if if_absent and found is not None:
                raise PreconditionFailed(f"put {key}: there is one", code="PreconditionFailed")
            if if_match is not None and (found is None or found.etag != if_match):
                raise PreconditionFailed(f"put {key}: another version", code="PreconditionFailed")
        modified_ms = self.now_ms() // 1000 * 1000
        if self.directory:
            modified_ms = self.now_ms() if timestamp_ms is None else timestamp_ms
            metadata = {}
        etag = hashlib.md5(body).hexdigest()
        self.objects[key] = _Object(body, etag, modified_ms, dict(metadata))
        self.everything[key] = hashlib.sha256(body).hexdigest()
        self.runtime.note("lands", key, len(body))
        if who is not None:
            self.watch(key, body, who)
        return ObjectInfo(key, len(body), modified_ms, etag, metadata)

    def get(self, key: str) -> _Object:
        found = self.objects.get(key)
        if found is None:
            raise ObjectNotFound(f"no object {key}", code="NoSuchKey")
        return found

    def copy(self, source: str, target: str) -> ObjectInfo:
        found = self.get(source)
        modified_ms = found.modified_ms if self.directory else self.now_ms() // 1000 * 1000
        self.objects[target] = replace(found, modified_ms=modified_ms)
        self.everything[target] = self.everything[source]
        self.runtime.note("lands", target, "a copy of", source)
        return ObjectInfo(target, len(found.body), modified_ms, found.etag, found.metadata)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            if self.objects.pop(key, None) is not None:
                self.runtime.note("deleted", key)

    # -- what comes later ---------------------------------------------------------------------

    def later(self, what: str, effect: Callable[[], object], after_s: float) -> None:
        """Have a request take effect after its client has stopped waiting."""
        self._seq += 1
        number = self._seq
        self.pending[number] = (what, effect)
        self.runtime.spawn(lambda: self._land(number), f"late-{number}", after_s=after_s)

    def release(self) -> None:
        """What was held on its way lands soon."""
        held, self.held = self.held, []
        for what, effect in held:
            self.later(what, effect, self.rng.choice((0.0, 1.0, 1.0, 1.5)) + self.rng.random())

    def _land(self, number: int) -> None:
        landing = self.pending.pop(number, None)
        if landing is None:
            return
        what, effect = landing
        try:
            effect()
        except StoreError as error:
            self.runtime.note("late", what, type(error).__name__)
        else:
            self.runtime.note("late", what)

    def land_everything(self) -> None:
        """All that is still under way arrives now."""
        numbers = list(self.pending)
        self.rng.shuffle(numbers)
        for number in numbers:
            self._land(number)

    def is_away(self) -> bool:
        """Whether no request gets through now."""
        return self.runtime.now < self.away_until


class Client:
    """A store as one process sees it: implements ``ObjectStore``."""

    def __init__(self, bucket: Bucket, owner: Owner | None = None) -> None:
        self._bucket = bucket
        self._runtime = bucket.runtime
        self._owner = owner
        self.url = "file:///replica" if bucket.directory else "s3://replica"
        self.logical_times = bucket.directory

    def level_prefix(self, level: int) -> str:
        return f"ltx/{level}/" if self._bucket.directory else f"{level:04x}/"

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
        content = body.read_bytes() if isinstance(body, Path) else bytes(body)

        def effect() -> ObjectInfo:
            return self._bucket.put(
                key, content, timestamp_ms, metadata or {}, if_absent, if_match, self._owner
            )

        conditional = if_absent or if_match is not None
        return self._request("put", key, effect, changes=True, conditional=conditional)

    def copy(self, source: str, target: str) -> ObjectInfo:
        return self._request(
            "copy", target, lambda: self._bucket.copy(source, target), changes=True
        )

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        def effect() -> bytes:
            body = self._bucket.get(key).body
            return body[start:] if length is None else body[start : start + length]

        return self._request("get", key, effect)

    def read(self, key: str, *, unless_etag: str | None = None) -> Version | None:
        def effect() -> Version | None:
            found = self._bucket.get(key)
            if found.etag == unless_etag:
                return None
            now_ms = self._bucket.now_ms()
            if not self._bucket.directory:
                now_ms = now_ms // 1000 * 1000
            return Version(found.body, found.etag, found.modified_ms, now_ms)

        return self._request("read", key, effect)

    def head(self, key: str) -> ObjectInfo:
        def effect() -> ObjectInfo:
            found = self._bucket.get(key)
            return ObjectInfo(key, len(found.body), found.modified_ms, found.etag, found.metadata)

        return self._request("head", key, effect)

    def list(self, prefix: str, start_after: str | None = None) -> Iterator[ObjectInfo]:
        def page(behind: str | None) -> list[ObjectInfo]:
            objects = self._bucket.objects
            keys = sorted([key for key in objects if key.startswith(prefix)])
            if behind is not None:
                del keys[: bisect.bisect_right(keys, behind)]
            found = [(key, objects[key]) for key in keys[: self._bucket.page]]
            return [ObjectInfo(k, len(o.body), o.modified_ms, o.etag) for k, o in found]

        behind = start_after
        while True:
            infos = self._request("list", prefix, partial(page, behind))
            yield from infos
            if len(infos) < self._bucket.page:
                return
            behind = infos[-1].key

    def delete(self, keys: Sequence[str]) -> None:
        self._request("delete", " ".join(keys), lambda: self._bucket.delete(keys), changes=True)

    def close(self) -> None:
        pass

    def _request(
        self,
        operation: str,
        key: str,
        effect: Callable[[], _T],
        *,
        changes: bool = False,
        conditional: bool = False,
    ) -> _T:
        bucket, runtime, rng = self._bucket, self._runtime, self._bucket.rng
        if self._owner is None:
            return effect()  # of the checker: no weather
        bucket.n_requests += 1
        weather = bucket.weather
        what = f"{operation} {key}"

        def failed(text: str, *, ambiguous: bool = changes, code: str | None = None) -> StoreError:
            runtime.note("fails", what, text)
            return StoreUnavailable(f"{what}: {text}", ambiguous=ambiguous, code=code)

        if bucket.is_away():
            runtime.sleep(rng.choice((0.001, weather.timeout_s)))
            raise failed("the store is away", ambiguous=False)
        if bucket.straggler is self._owner and conditional and key.startswith(self.level_prefix(0)):
            bucket.straggler = None
            bucket.held.append((what, effect))
            bucket.stopped(self._owner)
            runtime.sleep(weather.timeout_s)
            raise failed("timed out")
        # What changes something is what there is to learn from.
        fate = rng.random() * (1 if changes else 4)

        def happens(chance: float) -> bool:
            nonlocal fate
            fate -= chance
            return fate < 0

        travel = 0.005 + 0.03 * rng.random()
        latest = travel + weather.latest_s * rng.random() ** 2
        if happens(weather.lost):
            runtime.sleep(weather.timeout_s)
            raise failed("timed out, lost")
        if happens(weather.late):
            if changes:
                bucket.later(what, effect, latest)
            runtime.sleep(weather.timeout_s)
            raise failed("timed out")
        if changes and conditional and bucket.under_way.get(key) and rng.random() < 0.3:
            runtime.sleep(travel)
            raise failed("409", ambiguous=False, code="ConditionalRequestConflict")
        bucket.under_way[key] = bucket.under_way.get(key, 0) + 1
        try:
            runtime.sleep(travel)
        except Killed:
            if changes and rng.random() < 0.5:  # it was on its way already
                bucket.later(what, effect, rng.choice((0.0, latest)))
            raise
        finally:
            bucket.under_way[key] -= 1
        if happens(weather.refused):
            code, has_effect, retryable = rng.choice(_REFUSALS)
            if has_effect and changes and rng.random() < 0.5:
                with contextlib.suppress(StoreError):
                    effect()
            runtime.sleep(travel)
            error = failed(code, ambiguous=changes and has_effect, code=code)
            error.retryable = retryable
            raise error
        again = happens(weather.twice)
        silent = happens(weather.silent)
        slow = happens(weather.slow)
        try:
            result = effect()
        finally:
            if again and changes:
                bucket.later(what, effect, latest)
            if silent:
                runtime.sleep(weather.timeout_s)
                raise failed("the answer was lost")
            runtime.sleep(weather.timeout_s * 0.9 * rng.random() if slow else travel)
        return result


#: Code, whether the request may have been done, whether asking again may help.
_REFUSALS = (
    ("RequestCanceled", True, True),  # 408, as Tigris sheds load
    ("SlowDown", False, True),  # 503
    ("TooManyRequests", False, True),  # 429
    ("InternalError", True, True),  # 500
    ("AccessDenied", False, False),  # 403
)
