"""One merge, from its inputs to the object in the replica: in one pass and bounded memory into a
file, and put from there, create-only.

Inputs come from copies on this disk where there are any, else from the replica by ranged reads.
What to merge, whether this process may, and where it is done is decided above (`compaction`,
`merge_process`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from .errors import FormatError, PreconditionFailed, StoreError
from .files import Files
from .format.ltx import HEADER_SIZE, Header, PageEncoding
from .format.merge import MergeInput, merge
from .store.base import SHA256_METADATA, ObjectStore, SegmentInfo

__all__ = ["Apart", "Input", "Made", "Merge", "carry_out", "put"]

#: Read-ahead of all inputs of a merge that come from the replica, together, and of one at least
#: and at most, bytes.
_READ_AHEAD_BYTES: Final = 32 * 1024 * 1024
_READ_MIN_BYTES: Final = 128 * 1024
_READ_MAX_BYTES: Final = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Input:
    """A segment of the replica, and a copy of it on this disk if there was one."""

    segment: SegmentInfo
    copy: Path | None = None


@dataclass(frozen=True, slots=True)
class Merge:
    """What is to be merged.

    Attributes:
        inputs: oldest first.
        min_txid, max_txid: what they hold together.
        timestamp_ms: of the result.
        encoding: how its pages are stored.
        path: the file that is made, and stays.
        key: of the object.
        conditional: whether the store is asked for create-only.
        is_full: the single input holds all pages, whatever came before it.
        is_newest: it is to be a snapshot of the newest state; one of a later TXID will do.
    """

    inputs: Sequence[Input]
    min_txid: int
    max_txid: int
    timestamp_ms: int
    encoding: PageEncoding
    path: Path
    key: str
    conditional: bool
    is_full: bool = False
    is_newest: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """What came of a merge.

    Attributes:
        max_txid, timestamp_ms, key: of the result; those that were asked for, unless it is of the
            newest state.
        size_bytes: of the result.
        conditional: false if it turned out that the store cannot be asked for create-only.
    """

    max_txid: int
    timestamp_ms: int
    key: str
    size_bytes: int
    conditional: bool


class Apart(Protocol):
    """Carries merges out in another process."""

    def run(
        self, job: Merge, *, look_up: Callable[[], object], may_put: Callable[[], object]
    ) -> Made:
        """As `carry_out`; one at a time.

        Raises:
            ChildError: that other process could not be started, or ended without an answer.
            ClosedError: it was killed.
        """

    def kill(self, *, wait: bool) -> None:
        """End what is under way, from any thread; ``look_up`` must raise before this is called.

        Args:
            wait: until it is gone.
        """

    def leave_database(self) -> None:
        """From any thread: there is no lock on the database any more when this returns, until
        `enter_database`; what needs one is done in another way."""

    def enter_database(self) -> None:
        """From any thread: the database may be read again."""

    def forget(self) -> None:
        """In a forked child: that process is not ours."""


def carry_out(
    job: Merge,
    store: ObjectStore,
    files: Files,
    *,
    look_up: Callable[[], object] = lambda: None,
    may_put: Callable[[], object],
) -> Made:
    """Merge, and put the result.

    Args:
        store: the replica.
        look_up: called now and then meanwhile; raises if it should not go on.
        may_put: called before anything is sent; raises if this process may not change the replica.

    Raises:
        FormatError: inputs are damaged, or do not continue each other.
        StoreError: a request failed.
        OSError: a file of this disk cannot be read or written.
    """
    sha256 = _merge_into(job, store, files, look_up)
    may_put()
    return put(job, store, files, sha256)


def _merge_into(job: Merge, store: ObjectStore, files: Files, look_up: Callable[[], object]) -> str:
    """Merge into the file; returns its sha256, hex."""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as opened:
        inputs = []
        share = _READ_AHEAD_BYTES // len(job.inputs)
        ahead = max(_READ_MIN_BYTES, min(_READ_MAX_BYTES, share))
        for each in job.inputs:
            file = _open(each.copy, files)
            if file is not None:
                opened.enter_context(file)
                inputs.append(MergeInput(file.read, each.segment.key))
            else:
                fetch = _Fetch(store, each.segment, ahead)
                inputs.append(MergeInput(fetch.read, each.segment.key))
        fd = files.open(job.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        opened.callback(files.close, fd)

        def write(parts: Sequence[Any]) -> None:
            look_up()
            data = b"".join(parts)
            digest.update(data)
            files.write(fd, [data])

        merge(
            inputs,
            write,
            # All pages must be there, or this raises.
            min_txid=1 if job.is_full else None,
            timestamp_ms=job.timestamp_ms,
            encoding=job.encoding,
        )
        header = Header.unpack(files.pread(fd, HEADER_SIZE, 0))
    if (header.min_txid, header.max_txid) != (job.min_txid, job.max_txid):
        raise FormatError(
            f"{job.inputs[0].segment.key} to {job.inputs[-1].segment.key} do not hold the TXIDs "
            "of their names"
        )
    return digest.hexdigest()


def _open(copy: Path | None, files: Files) -> BinaryIO | None:
    """A copy, to be read from its beginning; None if it is not there."""
    try:
        return None if copy is None else files.reader(copy)
    except OSError:
        return None


def put(job: Merge, store: ObjectStore, files: Files, sha256: str) -> Made:
    """Put the file that was made.

    Args:
        sha256: of it, hex.

    Raises:
        StoreError: a request failed.
    """
    conditional = _put(job, store, sha256)
    size_bytes = files.stat(job.path).st_size
    return Made(job.max_txid, job.timestamp_ms, job.key, size_bytes, conditional)


def _put(job: Merge, store: ObjectStore, sha256: str) -> bool:
    """Put the file; returns whether the store can be asked for create-only."""
    metadata = {SHA256_METADATA: sha256}
    conditional = job.conditional
    if_match = None
    for _ in range(2):
        try:
            store.put(
                job.key,
                job.path,
                timestamp_ms=job.timestamp_ms,
                metadata=metadata,
                if_absent=conditional and if_match is None,
                if_match=if_match,
            )
            return conditional
        except PreconditionFailed:
            found = store.head(job.key)
            if found.size_bytes or found.etag is None:
                return conditional  # ours, its answer lost; nobody else has the lease
            if_match = found.etag
        except StoreError as error:
            if not conditional or error.code != "NotImplemented":
                raise
            conditional = False
    raise StoreError(f"{job.key} changes while it is written", retryable=True)


class _Fetch:
    """One object of the replica as something to read from, a range at a time."""

    def __init__(self, store: ObjectStore, segment: SegmentInfo, ahead_bytes: int) -> None:
        self._store = store
        self._segment = segment
        self._ahead_bytes = ahead_bytes
        self._offset = 0
        self._buffer = memoryview(b"")

    def read(self, n: int) -> memoryview:
        """Up to ``n`` bytes; none at the end."""
        if not self._buffer:
            left = self._segment.size_bytes - self._offset
            if left > 0:
                length = min(self._ahead_bytes, left)
                data = self._store.get(self._segment.key, self._offset, length)
                self._offset += len(data)
                self._buffer = memoryview(data)
        piece, self._buffer = self._buffer[:n], self._buffer[n:]
        return piece
