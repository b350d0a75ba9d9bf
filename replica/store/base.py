"""What every object store can do, and how a replica's keys are laid out.

Keys are relative to the root that the store was opened with (bucket and path, or directory), with
``/`` between parts and no leading slash.  All methods may be called from any thread and at once.

A segment of level ``n`` lies under ``<n as 4 hex digits>/`` in S3 and under ``ltx/<n in decimal>/``
in a directory; the name is ``<min txid>-<max txid>.ltx`` in both (Litestream 0.5's layout).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from walship.replica.format.types import format_segment_name, parse_segment_name

__all__ = [
    "IN_FLIGHT_MAX",
    "PREVIOUS_METADATA",
    "SHA256_METADATA",
    "Body",
    "ObjectInfo",
    "ObjectStore",
    "SegmentInfo",
    "Version",
    "list_segments",
    "segment_key",
]

#: Object metadata of a segment that walship wrote: sha256 of its content, hex.  Proof that an
#: object is ours although the answer to its PUT was lost, and that walship wrote it at all.
SHA256_METADATA: Final = "walship-sha256"
#: Object metadata of a segment: sha256 of the one with the TXID before it, hex, as its writer knows
#: it.  So the history is a chain: a segment that rests on another one than the replica holds is not
#: part of it.
PREVIOUS_METADATA: Final = "walship-previous"
#: Uploads that may be under way at once, with a margin for later versions.  A writer that dies
#: with one lost in the middle leaves a gap of less than this below the newest.
IN_FLIGHT_MAX: Final = 8

#: Content of an object: bytes in memory, or a file that nobody changes until the put returns.
Body = bytes | bytearray | memoryview | Path


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as a listing or a HEAD shows it.

    Attributes:
        key: relative to the store's root.
        size_bytes: length of the content.
        modified_ms: storage time, milliseconds since the Unix epoch.
        etag: the store's tag for this version, without quotes, or None where there is none.  What
            a put returns can be given to ``put(..., if_match=)``.
        metadata: user metadata, lower-case names; empty in listings.
    """

    key: str
    size_bytes: int
    modified_ms: int
    etag: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a small object, whole.

    Attributes:
        body: its content.
        etag: its tag, without quotes, for ``if_match``.  Other content has another one; S3 makes it
            from the content alone, so what is swapped must hold something that never comes again.
        modified_ms: storage time, milliseconds since the Unix epoch.
        now_ms: the time of the answer.  Both times are by the store's own clock, so that their
            difference is the object's age whatever the clocks of the hosts say; whole seconds in
            S3.
    """

    body: bytes
    etag: str
    modified_ms: int
    now_ms: int


class ObjectStore(Protocol):
    """Bytes under names.  Thread-safe.  Errors are ``StoreError`` and its subclasses only."""

    @property
    def url(self) -> str:
        """Where this store is, for people: no secrets."""

    @property
    def logical_times(self) -> bool:
        """Whether listings show the time that a put was given (``timestamp_ms``) as
        ``modified_ms``, and not when the store took the object."""

    def level_prefix(self, level: int) -> str:
        """Prefix of the keys of one level's segments, ending in ``/``."""

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
        """Create or replace an object, atomically visible and durable when this returns.

        With ``if_match`` this is a compare-and-swap: of several such puts with the same tag, from
        any threads, processes and hosts, one succeeds at most.  (In a directory that holds among
        conditional puts; a plain put or a delete of the same key at that moment may be lost.)

        Args:
            timestamp_ms: logical time of the content: ``litestream-timestamp`` metadata in S3, the
                file's modification time in a directory.
            metadata: further user metadata; a directory store drops it.
            if_absent: create only.
            if_match: replace only the version with this etag.

        Returns:
            What is stored now, with an etag for the next ``if_match``.

        Raises:
            ValueError: both ``if_absent`` and ``if_match``.
            PreconditionFailed: ``if_absent`` and the key exists; ``if_match`` and the object is
                another version or gone.
            StoreError: anything else; ``ambiguous`` says whether the object may exist now.
        """

    def copy(self, source: str, target: str) -> ObjectInfo:
        """Create or replace an object with what another one holds, times and metadata included.

        The content does not pass through this host: a copy within the server, a second name in a
        directory.

        Returns:
            The new object; ``modified_ms`` is storage time, as in listings.

        Raises:
            ObjectNotFound: no such source.
            StoreError: anything else; code "NotImplemented" where the store cannot copy.
        """

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Read ``length`` bytes from ``start`` (to the end without a length; fewer at the end).

        Raises:
            ObjectNotFound: no such key.
        """

    def read(self, key: str, *, unless_etag: str | None = None) -> Version | None:
        """Read a small object whole, with its tag and its age; one request.

        Args:
            unless_etag: a tag seen before.

        Returns:
            The newest version, or None if that is still the one with ``unless_etag``.

        Raises:
            ObjectNotFound: no such key.
        """

    def head(self, key: str) -> ObjectInfo:
        """Size, time and metadata of one object.

        Raises:
            ObjectNotFound: no such key.
        """

    def list(self, prefix: str, start_after: str | None = None) -> Iterator[ObjectInfo]:
        """Objects whose key starts with ``prefix``, in key order, behind ``start_after``."""

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; a key that does not exist is no error.

        Raises:
            StoreError: naming the first key that could not be removed.
        """

    def close(self) -> None:
        """Give up connections.  Safe to call twice."""


@dataclass(frozen=True, slots=True, order=True)
class SegmentInfo:
    """One segment of a replica, as listed.  Orders by level, then TXIDs.

    Attributes:
        level: 0 fresh, 1..8 compacted, 9 snapshot.
        min_txid, max_txid: the TXIDs the segment covers, both inclusive.
        size_bytes: length of the object.
        created_ms: object time (storage time until replaced by the metadata's), ms since the epoch.
        key: where it lies, relative to the store's root.
        etag: the store's tag for this version, as in `ObjectInfo`; does not count in comparisons.
    """

    level: int
    min_txid: int
    max_txid: int
    size_bytes: int
    created_ms: int
    key: str
    etag: str | None = field(default=None, compare=False)


def segment_key(store: ObjectStore, level: int, min_txid: int, max_txid: int) -> str:
    """Key of a segment in this store's layout."""
    return store.level_prefix(level) + format_segment_name(min_txid, max_txid)


def list_segments(
    store: ObjectStore, level: int, *, after_txid: int | None = None
) -> Iterator[SegmentInfo]:
    """Segments of one level in the order of their names; other names are passed over.

    Args:
        after_txid: only names that sort behind ``<after_txid>-<after_txid>.ltx``.
    """
    prefix = store.level_prefix(level)
    start_after = None
    if after_txid is not None:
        start_after = prefix + format_segment_name(after_txid, after_txid)
    for info in store.list(prefix, start_after):
        txids = parse_segment_name(info.key[len(prefix) :])
        if txids is not None:
            yield SegmentInfo(level, *txids, info.size_bytes, info.modified_ms, info.key, info.etag)
