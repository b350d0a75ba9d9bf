"""Every public exception.

The tree (indented under its parent)::

    ReplicaError
        ConfigError              a setting, URL or argument that cannot be used
        FormatError              bytes that are not what they should be
            ChecksumError        ... because a checksum does not match
        ContinuityError          local database and replica do not continue each other
        StoreError               the object store said no or did not answer
            ObjectNotFound       no object under that key
            PreconditionFailed   a create-only or compare-and-swap write lost
            StoreUnavailable     no usable answer; worth trying again
        RestoreError             a restore that could not be done
            NoBackupError        ... because the replica holds nothing that fits the target
            GapError             ... because segments are missing in the middle
            OutputExistsError    ... because something is in its place already
            IntegrityError       ... because SQLite found the result damaged
        ClosedError              the handle was closed
        FencedError              another writer owns the replica       (replica.sqlite)
        NotYetReplicated         a wait ended first; the commit is local (replica.sqlite)
        SpoolError               the local spool cannot be written     (replica.sqlite)
        RefusedError             SQLite was asked for what cannot be replicated (replica.sqlite)

The last four cross SQLite's own call stack and therefore are ``apsw.IOError`` too; they live in
``replica.sqlite`` so that format and store stay free of apsw.  Catch ``ReplicaError`` for all.

Facts are attributes, the message is one line that says what to do, the cause is chained.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "ChecksumError",
    "ClosedError",
    "ConfigError",
    "ContinuityError",
    "FormatError",
    "GapError",
    "IntegrityError",
    "NoBackupError",
    "ObjectNotFound",
    "OutputExistsError",
    "PreconditionFailed",
    "ReplicaError",
    "RestoreError",
    "StoreError",
    "StoreUnavailable",
]


class ReplicaError(Exception):
    """Base of everything this library raises on purpose.  Can be pickled, for other processes."""

    def __reduce__(self) -> tuple[object, ...]:
        # Exception's own way calls the class with the message alone.
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(
    kind: type[ReplicaError], args: tuple[object, ...], facts: dict[str, object]
) -> ReplicaError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(facts)
    return error


class ConfigError(ReplicaError):
    """A setting, URL or argument that cannot be used; the message names it and says what fits."""


class FormatError(ReplicaError):
    """Bytes that do not follow their format (LTX, WAL, spool journal)."""


class ChecksumError(FormatError):
    """Well-formed bytes whose checksum does not match: damaged in storage or transit."""


class ContinuityError(ReplicaError):
    """Local database and replica do not continue each other; nothing was written.

    Attributes:
        local_txid: TXID of the local record, or None without one.
        replica_txid: highest TXID in the replica, or None if it is empty.
    """

    def __init__(
        self, message: str, *, local_txid: int | None = None, replica_txid: int | None = None
    ) -> None:
        super().__init__(message)
        self.local_txid = local_txid
        self.replica_txid = replica_txid


class StoreError(ReplicaError):
    """The object store refused a request or failed.

    Attributes:
        retryable: whether the same request may succeed later without anybody's help.
        ambiguous: whether a write may have taken effect although no success was seen.
        code: the provider's error code or HTTP status as text, or None.
    """

    retryable = False
    ambiguous = False

    def __init__(
        self,
        message: str,
        *,
        retryable: bool | None = None,
        ambiguous: bool | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        if retryable is not None:
            self.retryable = retryable
        if ambiguous is not None:
            self.ambiguous = ambiguous
        self.code = code


class ObjectNotFound(StoreError):
    """No object under that key (or no such bucket: the message says which)."""


class PreconditionFailed(StoreError):
    """A create-only write found an object under its key, or a compare-and-swap write lost."""


class StoreUnavailable(StoreError):
    """No usable answer: time-out, reset, throttling, 5xx.  Worth trying again."""

    retryable = True
    ambiguous = True


class RestoreError(ReplicaError):
    """A restore that could not be done; the output was not touched."""


class NoBackupError(RestoreError):
    """The replica holds nothing that fits the target (or nothing at all)."""


class GapError(RestoreError):
    """The replica misses a segment in the middle, so that its newest state cannot be reached.

    Attributes:
        reachable_txid: the last TXID before the gap (0: not even the first segment is there).
        next_txid: the first TXID behind the gap.
    """

    def __init__(self, message: str, *, reachable_txid: int, next_txid: int) -> None:
        super().__init__(message)
        self.reachable_txid = reachable_txid
        self.next_txid = next_txid


class OutputExistsError(RestoreError):
    """The output exists already and was left alone."""


class IntegrityError(RestoreError):
    """SQLite's check found the restored database damaged; it was removed again.

    Attributes:
        findings: what SQLite reported, at least one line.
    """

    def __init__(self, message: str, findings: Sequence[str]) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class ClosedError(ReplicaError):
    """The replication handle was closed and cannot be used any more."""
