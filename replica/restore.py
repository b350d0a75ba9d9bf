"""Restores a database from a replica: list, plan, fetch, check, and only then the name.

It sits on the stores, `replica.plan` (which segments), `replica.apply` (their pages) and
`replica.v03` (the layout of Litestream 0.3); the command line and `walship.restore` call it.  The
output is written under a temporary name beside its own.  Until it is complete, synced and, if
wanted, checked by SQLite, nothing that existed before is touched; then it appears in one step.

It does not retry requests (give it a `RetryingStore`), and it does not follow a replica.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from walship.replica.apply import Fetcher, apply_segments
from walship.replica.check import IntegrityMode, integrity_check
from walship.replica.clock import Clock
from walship.replica.config.url import is_url
from walship.replica.config.values import parse_choice
from walship.replica.errors import (
    ConfigError,
    IntegrityError,
    NoBackupError,
    ObjectNotFound,
    OutputExistsError,
    RestoreError,
)
from walship.replica.format.types import LEVEL_SNAPSHOT, format_txid
from walship.replica.listing import list_replica, live_segments
from walship.replica.plan import Plan, plan
from walship.replica.store.base import ObjectInfo, ObjectStore, SegmentInfo
from walship.replica.store.local import fsync_directory, fsync_file, make_directories
from walship.replica.store.timestamps import TIMESTAMP_METADATA, parse_timestamp
from walship.replica.v03 import V03Plan, apply_v03, list_v03, plan_v03

__all__ = [
    "Progress",
    "RestoreResult",
    "Source",
    "find_source",
    "list_replica",
    "output_file",
    "restore",
    "with_metadata_times",
]

_log = logging.getLogger(__name__)

#: ``progress(bytes fetched so far, bytes expected)``; called in the thread that restores.
Progress = Callable[[int, int], object]

#: HEAD requests at once when a timestamp asks for the metadata of every object.
_HEADS_AT_ONCE: Final = 50
_HEADS_PLANNED: Final = 1000
#: Plans a restore makes at most, when retention or compaction removes one of its objects meanwhile.
_PLANS: Final = 5
#: The output is handed to the disk in steps of this many bytes while the rest is being fetched, so
#: that little is left to wait for in the end.
_FLUSH_BYTES: Final = 64 << 20
_SIDECARS: Final = ("-wal", "-shm", "-journal")
_TEMP_SUFFIX: Final = ".restore.tmp"
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK})


@dataclass(frozen=True, slots=True)
class Source:
    """What a restore will read: exactly one of the two is not None.

    Attributes:
        plan: segments of the current layout.
        v03: objects of the layout of Litestream 0.3.
        sha256: of the segment that reaches furthest, hex; empty if nobody knows.
    """

    plan: Plan | None
    v03: V03Plan | None
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreResult:
    """What a restore did.

    Attributes:
        output: the restored file.
        txid: the state it holds, or None from a replica of Litestream 0.3, which has no TXIDs.
        page_size: of the database, in bytes.
        commit: its size in pages.
        n_segments: segments (or objects of the old layout) it was made from.
        bytes_fetched: bytes read from the store, listings not counted.
        pages_decoded: pages decompressed.
        pages_written: pages written, each once.
        duration_s: seconds from listing to completion.
        integrity_check: the check that was passed, or "none".
        source: the segments that were used.
        warnings: sentences about what was left out.
    """

    output: Path
    txid: int | None
    page_size: int
    commit: int
    n_segments: int
    bytes_fetched: int
    pages_decoded: int
    pages_written: int
    duration_s: float
    integrity_check: IntegrityMode
    source: Source
    warnings: tuple[str, ...] = ()


def restore(
    store: ObjectStore,
    output: str | os.PathLike[str],
    *,
    clock: Clock,
    txid: int | None = None,
    timestamp_ms: int | None = None,
    parallelism: int = 8,
    integrity_check: IntegrityMode = "none",
    verify: Literal["auto", "full"] = "auto",
    progress: Progress | None = None,
    overwrite: bool = False,
    inspect: Callable[[RestoreResult], object] | None = None,
    keep: bool = True,
) -> RestoreResult:
    """Restore a database to a file.

    The file appears under its name complete and synced, or not at all; whatever was there before
    is untouched until then.  Missing parent directories are made.

    Args:
        store: the replica; should retry by itself.
        output: the database file to make.
        txid: restore exactly this TXID; the newest state without it.
        timestamp_ms: restore the newest state strictly before this, in ms since the epoch.
        parallelism: requests under way at once, at least 1.
        integrity_check: have SQLite check the file before it gets its name.
        verify: "auto" reads of large segments that are mostly outdated only the pages needed, which
            leaves their file checksums unverified; "full" reads and verifies everything.
        overwrite: replace an existing database.  Its -wal, -shm and -journal files, which do not
            belong to the new one, are removed immediately before; nobody may have it open.
        inspect: called when the file is complete and does not have its name yet, with that it has
            (and a duration of 0).
        keep: False removes the file again once it was inspected, in place of giving it its name:
            a trial, for which nothing is synced.

    Raises:
        ConfigError: arguments that cannot be used.
        OutputExistsError: the output exists and ``overwrite`` was not given.
        NoBackupError: the replica has nothing that fits.
        GapError: segments are missing in the middle.
        FormatError: the replica is damaged.
        IntegrityError: the check failed.
        StoreError: the replica could not be read.
        RestoreError: the output could not be written.
    """
    if parallelism < 1:
        raise ConfigError(f"parallelism must be at least 1, not {parallelism}")
    parse_choice("none", "quick", "full")("integrity_check", integrity_check)
    parse_choice("auto", "full")("verify", verify)
    target = output_file(output)
    started = clock.monotonic()
    with _explained(target):
        _check_output(target, overwrite)
        tried: Source | None = None
        for _ in range(_PLANS):
            source = find_source(
                store, txid=txid, timestamp_ms=timestamp_ms, parallelism=parallelism
            )
            if source == tried:
                break
            try:
                with _Temporary(target) as temporary:
                    result = _fill(
                        store, source, temporary, parallelism, verify == "full", progress, keep
                    )
                    _check_database(temporary.path, integrity_check)
                    if inspect is not None:
                        inspect(result)
                    if keep:
                        temporary.publish(overwrite)
            except ObjectNotFound as error:
                # Retention may remove what a newer snapshot or compaction replaces.
                _log.info("an object disappeared, planning again: %s", error)
                tried, missing = source, error
                continue
            return replace(
                result,
                output=target,
                integrity_check=integrity_check,
                duration_s=clock.monotonic() - started,
            )
        raise RestoreError(f"the replica is listed but cannot be read: {missing}") from missing


def output_file(output: str | os.PathLike[str]) -> Path:
    """The file that a restore is to write, absolute.

    Raises:
        ConfigError: it is no name of a file.
    """
    text = os.fsdecode(output)
    if not text or "\0" in text:
        raise ConfigError(f"output: {text!r} is not a file to write")
    if is_url(text):
        raise ConfigError(f"output: {text} is a URL: name the database file to write")
    return Path(os.path.abspath(text))


def find_source(
    store: ObjectStore,
    *,
    txid: int | None = None,
    timestamp_ms: int | None = None,
    parallelism: int = 8,
) -> Source:
    """List a replica and decide what a restore reads.

    If it also holds data in the layout of Litestream 0.3, the newer of the two is taken (by
    timestamp: the one with the newer snapshot before it); a TXID exists in the current layout only.

    Raises:
        ConfigError, NoBackupError, GapError, StoreError: as `restore`.
    """
    if txid is not None and timestamp_ms is not None:
        raise ConfigError("give a TXID or a timestamp to restore to, not both")
    with ThreadPoolExecutor(1) as pool:
        old_listing: Future[list[ObjectInfo]] | None = None
        if txid is None:
            old_listing = pool.submit(list_v03, store)
        segments = list_replica(store, parallelism=parallelism)
        old = plan_v03(old_listing.result(), before_ms=timestamp_ms) if old_listing else None
    live = live_segments(store, segments)
    segments, left_out = live.segments, live.reason
    if timestamp_ms is not None:
        segments = with_metadata_times(store, segments)
    if old is not None and _old_is_newer(old, segments, timestamp_ms):
        return Source(None, old)
    if not segments:
        because = f": {left_out}" if left_out else ""
        raise NoBackupError(f"there is no backup at {store.url}{because}")
    try:
        found = plan(segments, txid=txid, before_ms=timestamp_ms)
    except NoBackupError:
        if old is not None:
            return Source(None, old)
        raise
    if left_out and txid is None and timestamp_ms is None:
        warning = f"{left_out}; restoring TXID {format_txid(found.max_txid)}"
        found = replace(found, warnings=(*found.warnings, warning))
    return Source(found, None, live.sha256(found.segments[-1]))


def with_metadata_times(store: ObjectStore, segments: Sequence[SegmentInfo]) -> list[SegmentInfo]:
    """Segments with the time of their content: listings show when the object was stored."""
    if not segments:
        return []

    def look(segment: SegmentInfo) -> SegmentInfo | None:
        try:
            info = store.head(segment.key)
        except ObjectNotFound:
            return None  # removed since the listing
        logical = parse_timestamp(info.metadata.get(TIMESTAMP_METADATA, ""))
        return replace(segment, created_ms=info.modified_ms if logical is None else logical)

    found: list[SegmentInfo] = []
    with ThreadPoolExecutor(min(_HEADS_AT_ONCE, len(segments))) as pool:
        # A pool remembers a kilobyte for each call that waits.
        for first in range(0, len(segments), _HEADS_PLANNED):
            batch = segments[first : first + _HEADS_PLANNED]
            found += [segment for segment in pool.map(look, batch) if segment is not None]
    return found


def _old_is_newer(old: V03Plan, segments: Sequence[SegmentInfo], timestamp_ms: int | None) -> bool:
    if timestamp_ms is None:
        return old.newest_ms > max((s.created_ms for s in segments), default=-1)
    snapshots = [
        segment.created_ms
        for segment in segments
        if segment.level == LEVEL_SNAPSHOT and segment.created_ms < timestamp_ms
    ]
    return old.snapshot.info.modified_ms > max(snapshots, default=-1)


def _fill(
    store: ObjectStore,
    source: Source,
    temporary: _Temporary,
    parallelism: int,
    verify_full: bool,
    progress: Progress | None,
    durable: bool,
) -> RestoreResult:
    """Write the database to the temporary file and make it durable, if it is to stay."""
    with Fetcher(store, parallelism, progress) as fetcher, _Flusher(temporary.fd) as flusher:
        if source.plan is not None:
            applied = apply_segments(
                fetcher,
                source.plan.segments,
                temporary.fd,
                verify_full=verify_full,
                on_written=flusher.written if durable else None,
            )
            n_segments, txid = len(source.plan.segments), source.plan.max_txid
            warnings = source.plan.warnings
        else:
            assert source.v03 is not None
            applied = apply_v03(fetcher, source.v03, temporary.path, temporary.fd)
            n_segments, txid = 1 + len(source.v03.wal), None
            warnings = ()
    for warning in warnings:
        _log.warning("%s", warning)
    if durable:
        fsync_file(temporary.fd)
    return RestoreResult(
        output=temporary.path,
        txid=txid,
        page_size=applied.page_size,
        commit=applied.commit,
        n_segments=n_segments,
        bytes_fetched=fetcher.bytes_fetched,
        pages_decoded=applied.pages_decoded,
        pages_written=applied.pages_written,
        duration_s=0.0,
        integrity_check="none",
        source=source,
        warnings=warnings,
    )


def _check_database(path: Path, mode: IntegrityMode) -> None:
    findings = integrity_check(path, mode)
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise IntegrityError(
            f"the restored database fails SQLite's {mode} check: {findings[0]}{more}; nothing was"
            " kept (try an earlier -txid or -timestamp)",
            findings,
        )


def _check_output(target: Path, overwrite: bool) -> None:
    """Refuse an output that exists; an empty file without sidecars does not count."""
    if target.is_dir():
        raise RestoreError(f"{target} is a directory: name the database file to write")
    if target.exists() and not target.is_file():
        raise RestoreError(f"{target} is a device or the like: name the database file to write")
    if overwrite:
        return
    if target.exists() and target.stat().st_size > 0:
        raise OutputExistsError(
            f"{target} exists already: choose another output, or replace it with -force"
        )
    for suffix in _SIDECARS:
        sidecar = Path(f"{target}{suffix}")
        if sidecar.exists():
            raise OutputExistsError(
                f"{sidecar} exists and would be taken for part of the restored database: choose"
                " another output, or have it removed with -force"
            )


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn what the operating system says about the output into one clear line."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _NO_SPACE:
            reason = f"no room for it on the file system of {target.parent} ({reason})"
        raise RestoreError(f"cannot write {target}: {reason}; nothing was changed") from error


class _Flusher:
    """Has the kernel write the output to disk while more of it is made.  A context manager."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._done_bytes = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="walship-flush")
        self._running: Future[None] | None = None

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The descriptor must not be closed under a call that uses it.
        self._pool.shutdown(wait=True)
        if kind is None and self._running is not None:
            # The kernel reports a failed write-back once, maybe to this call and not to the last.
            self._running.result()

    def written(self, n_bytes: int) -> None:
        """Take note that the output has ``n_bytes`` now."""
        if n_bytes - self._done_bytes < _FLUSH_BYTES:
            return
        if self._running is not None:
            if not self._running.done():
                return
            self._running.result()
        self._done_bytes = n_bytes
        self._running = self._pool.submit(getattr(os, "fdatasync", os.fsync), self._fd)


class _Temporary:
    """The output under construction.  Removed on leaving the context unless it was published.

    It is locked as long as it is in use, so that what a killed process left behind is recognised
    and removed by the next restore to the same output.

    Attributes:
        path: where it is.
        fd: open for reading and writing.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path = target
        self.fd = -1

    def __enter__(self) -> _Temporary:
        make_directories(self._target.parent, 0o755)
        self._remove_stale()
        while True:
            name = f"{self._target.name}.{secrets.token_hex(4)}{_TEMP_SUFFIX}"
            self.path = self._target.with_name(name)
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            if self._is_linked():
                return self
            os.close(self.fd)  # taken for a stale one in the moment before the lock

    def __exit__(self, *_: object) -> None:
        if self.path != self._target:
            self._remove(self.path)
        os.close(self.fd)

    def publish(self, overwrite: bool) -> None:
        """Give the file its name.

        Raises:
            OutputExistsError: something has appeared under that name, and may not be replaced.
        """
        if overwrite:
            self._keep_mode_and_owner()
            # A WAL or hot journal of the old database would be replayed into the new one, so none
            # may be left when the name changes.  The other order of events, an old database that
            # has lost its WAL, is what a crash can leave in between: the user gave it up.
            removed = [os.path.lexists(path) for path in self._sidecars(self._target)]
            for path in self._sidecars(self._target):
                path.unlink(missing_ok=True)
            if any(removed):
                fsync_directory(self._target.parent)
            os.rename(self.path, self._target)
        else:
            self._link()
        self.path = self._target
        fsync_directory(self._target.parent)

    def _link(self) -> None:
        """Rename without replacing anything but an empty file."""
        _check_output(self._target, False)
        try:
            os.link(self.path, self._target)
        except FileExistsError:
            if self._target.stat().st_size > 0:
                raise OutputExistsError(
                    f"{self._target} appeared during the restore and was left alone"
                ) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            os.unlink(self.path)
            return
        os.rename(self.path, self._target)

    def _keep_mode_and_owner(self) -> None:
        try:
            old = self._target.stat()
        except FileNotFoundError:
            return
        os.fchmod(self.fd, stat.S_IMODE(old.st_mode))
        with contextlib.suppress(OSError):  # only root may
            os.fchown(self.fd, old.st_uid, old.st_gid)

    def _is_linked(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def _remove_stale(self) -> None:
        prefix = f"{self._target.name}."
        for path in self._target.parent.iterdir():
            if not (path.name.startswith(prefix) and path.name.endswith(_TEMP_SUFFIX)):
                continue
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # at work right now
            else:
                self._remove(path)
            finally:
                os.close(fd)

    def _remove(self, path: Path) -> None:
        for each in (path, *self._sidecars(path)):
            with contextlib.suppress(OSError):
                each.unlink(missing_ok=True)

    @staticmethod
    def _sidecars(path: Path) -> list[Path]:
        return [Path(f"{path}{suffix}") for suffix in ("-journal", "-wal", "-shm")]
