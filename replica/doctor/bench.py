"""Where the checks of a store work: keys of their own, threads that act at once, findings.

All objects of a probe lie beside the replica's own, under ``walship-doctor-<random>-``, which is no
name of a segment.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from walship.replica.clock import Clock
from walship.replica.errors import ObjectNotFound, StoreError
from walship.replica.store.base import ObjectStore, Version

__all__ = [
    "DENIED",
    "NOT_IMPLEMENTED",
    "WRITERS",
    "Bench",
    "Finding",
    "Status",
    "failed",
    "ok",
    "seconds",
    "skipped",
    "together",
    "warning",
]

log = logging.getLogger("walship.doctor")

_T = TypeVar("_T")

Status = Literal["ok", "failed", "warning", "skipped"]

#: Writers in a race, and requests under way at once elsewhere.
WRITERS: Final = 16

DENIED: Final = frozenset({"AccessDenied", "403", "EACCES", "EPERM", "EROFS"})
NOT_IMPLEMENTED: Final = frozenset({"NotImplemented", "501"})


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        status: "ok"; "failed": walship needs it; "warning": it works without; "skipped".
        seen: one line for people.
    """

    status: Status
    seen: str


def ok(seen: str) -> Finding:
    return Finding("ok", seen)


def failed(seen: str) -> Finding:
    return Finding("failed", seen)


def warning(seen: str) -> Finding:
    return Finding("warning", seen)


def skipped(seen: str) -> Finding:
    return Finding("skipped", seen)


def seconds(milliseconds: int) -> str:
    """A time span for people: to the second below two minutes, else to the minute."""
    n_seconds = round(milliseconds / 1000)
    return f"{n_seconds} s" if abs(n_seconds) < 120 else f"{round(n_seconds / 60)} min"


class Bench:
    """A store as the checks use it.

    Attributes:
        store: with retries around it, or a passing trouble counts as a failure.
        clock: this machine's.
        part_size: bytes above which the store writes in parts.
        prefix: beginning of all keys that are made here.
        is_directory: the store is a directory.
        abandoned: requests may still be under way.
    """

    def __init__(self, store: ObjectStore, clock: Clock, part_size: int) -> None:
        self.store = store
        self.clock = clock
        self.part_size = part_size
        self.prefix = f"walship-doctor-{secrets.token_hex(8)}-"
        self.is_directory = store.url.startswith("file:")
        self.abandoned = False
        self._keys: dict[str, None] = {}

    def key(self, name: str) -> str:
        """The key of that name, which is removed at the end whether or not it is written."""
        key = self.prefix + name
        self._keys[key] = None
        return key

    def read(self, key: str) -> Version:
        version = self.store.read(key)
        assert version is not None  # no tag was given
        return version

    def content(self, key: str) -> bytes | None:
        """Content of an object, or None where there is none."""
        try:
            return self.read(key).body
        except ObjectNotFound:
            return None

    def listed(self, name: str, start_after: str | None = None) -> list[str]:
        """Keys of this bench that begin with ``name``, as the store lists them."""
        return [info.key for info in self.store.list(self.prefix + name, start_after)]

    def text(self, error: StoreError) -> str:
        """An error without the parts of it that every line would repeat."""
        text = " ".join(str(error).split())
        return (text.partition(f"{self.store.url}: ")[2] or text).replace(self.prefix, "")

    def remove(self) -> None:
        """Delete every object that may have been written."""
        self.store.delete(list(self._keys))

    @contextlib.contextmanager
    def threads(self) -> Iterator[ThreadPoolExecutor]:
        """``WRITERS`` threads.  Their requests have ended when this ends, so that what they wrote
        can be removed; only a second interruption ends it before."""
        pool = ThreadPoolExecutor(WRITERS, "walship-doctor")
        try:
            yield pool
        except BaseException as error:
            self.abandoned = True
            if isinstance(error, KeyboardInterrupt):
                log.warning("waiting for answers, to leave nothing behind (once more to give up)")
            pool.shutdown(cancel_futures=True)
            self.abandoned = False
            raise
        pool.shutdown()


def together(pool: ThreadPoolExecutor, work: Callable[[int], _T]) -> list[_T]:
    """What ``work`` returns in ``WRITERS`` threads that begin at the same moment.

    Args:
        pool: with ``WRITERS`` threads, all idle.
        work: is given the number of its thread.
    """
    barrier = threading.Barrier(WRITERS)

    def released(n: int) -> _T:
        barrier.wait()
        return work(n)

    try:
        futures = [pool.submit(released, n) for n in range(WRITERS)]
        return [future.result() for future in futures]
    except BaseException:
        barrier.abort()  # nobody waits for threads that could not be started
        raise
