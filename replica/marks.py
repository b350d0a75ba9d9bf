"""Marks: names for states of a database, kept in its replica.

A mark is one object, ``marks/<label>.json`` beside the levels, where Litestream does not look::

    {"label": "before-migration", "txid": "000000000000002a", "time": "2026-01-31T15:54:00.000Z"}

It is made after the replica has that TXID.  As long as it exists, retention leaves alone what a
restore of exactly that state reads (`pinned`); only other programs do not know that.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .config.values import nearest
from .errors import ConfigError, FormatError, NoBackupError, ObjectNotFound, PreconditionFailed
from .format.types import format_txid, parse_txid
from .listing import replica_head
from .plan import format_time, plan
from .store.base import ObjectStore, SegmentInfo
from .store.timestamps import parse_timestamp

__all__ = [
    "KnownMarks",
    "Mark",
    "check_label",
    "find_mark",
    "list_marks",
    "pinned",
    "put_mark",
    "remove_mark",
]

log = logging.getLogger("walship.marks")

_PREFIX: Final = "marks/"
_SUFFIX: Final = ".json"
_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
#: A mark is some hundred bytes; what is larger is none.
_SIZE_MAX: Final = 4096
#: Labels that an error message names.
_NAMED_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class Mark:
    """A labelled state.

    Attributes:
        label: its name.
        txid: the state.
        time_ms: when it was marked, ms since the epoch.
    """

    label: str
    txid: int
    time_ms: int


#: Marks by their objects' keys, tags and times; None for what cannot be read.
KnownMarks = dict[tuple[str, str | None, int], Mark | None]


def check_label(label: str) -> None:
    """Raises ConfigError for what cannot be a label."""
    if not isinstance(label, str) or _LABEL.fullmatch(label) is None:
        raise ConfigError(
            f"label: {label!r} cannot be one: up to 100 letters, digits, '.', '_' and '-', of "
            "which the first is a letter or digit"
        )


def put_mark(store: ObjectStore, mark: Mark, *, replace: bool = False) -> None:
    """Make a mark, durably; safe to call again when the answer was lost.

    Args:
        store: the replica; it must have the mark's TXID already.
        replace: also if there is one of that label.

    Raises:
        ConfigError: the label cannot be used, or is in use and ``replace`` was not given.
        StoreError: the mark may not have been made.
    """
    check_label(mark.label)
    fields = {
        "label": mark.label,
        "txid": format_txid(mark.txid),
        "time": format_time(mark.time_ms),
    }
    body = json.dumps(fields).encode()
    try:
        store.put(_key(mark.label), body, timestamp_ms=mark.time_ms, if_absent=not replace)
    except PreconditionFailed:
        found = store.get(_key(mark.label))
        if found == body:
            return  # our own, whose answer was lost
        try:
            where = f"at TXID {format_txid(_parse(found, mark.label).txid)}"
        except FormatError:
            where = "which cannot be read"
        raise ConfigError(
            f"label: there is a mark {mark.label!r} already, {where}; choose another label, or "
            "replace it (replace=True)"
        ) from None


def find_mark(store: ObjectStore, label: str) -> Mark:
    """The mark with a label.

    Raises:
        ConfigError: it cannot be a label, or there is none; names the nearest that there are.
        NoBackupError: there is no replica either.
        FormatError: the mark cannot be read.
    """
    check_label(label)
    try:
        return _parse(store.get(_key(label), 0, _SIZE_MAX), label)
    except ObjectNotFound:
        labels = sorted(_labels(store))
    if not labels and replica_head(store) is None:
        raise NoBackupError(f"there is no backup at {store.url}")
    raise ConfigError(f"there is no mark {label!r} in {store.url}{_others(label, labels)}")


def list_marks(store: ObjectStore, known: KnownMarks | None = None) -> list[Mark]:
    """All marks, by TXID and label; those that cannot be read are left out, and the log says so.

    Args:
        known: what earlier calls found, which need not be read again; brought up to date.
    """
    before = {} if known is None else dict(known)
    after: KnownMarks = {}
    for info in store.list(_PREFIX):
        label = _label_of(info.key)
        if label is None:
            continue
        version = info.key, info.etag, info.modified_ms
        try:
            after[version] = (
                before[version]
                if version in before
                else _parse(store.get(info.key, 0, _SIZE_MAX), label)
            )
        except ObjectNotFound:
            continue  # removed since the listing
        except FormatError as error:
            after[version] = None
            log.warning("%s: %s", store.url, error)
    if known is not None:
        known.clear()
        known.update(after)
    found = [mark for mark in after.values() if mark is not None]
    return sorted(found, key=lambda mark: (mark.txid, mark.label))


def remove_mark(store: ObjectStore, label: str) -> Mark:
    """Remove a mark, so that retention need not keep its state any more; returns what it was.

    Raises:
        ConfigError, NoBackupError, FormatError: as `find_mark`.
    """
    mark = find_mark(store, label)
    store.delete([_key(label)])
    return mark


def pinned(segments: Iterable[SegmentInfo], txids: Iterable[int]) -> set[SegmentInfo]:
    """What restores of exactly these states read: retention leaves it alone.

    States that cannot be restored any more pin nothing.
    """
    listing = list(segments)
    keep: set[SegmentInfo] = set()
    for txid in set(txids):
        try:
            keep.update(plan(listing, txid=txid).segments)
        except NoBackupError:
            continue
    return keep


def _key(label: str) -> str:
    return f"{_PREFIX}{label}{_SUFFIX}"


def _labels(store: ObjectStore) -> list[str]:
    labels = (_label_of(info.key) for info in store.list(_PREFIX))
    return [label for label in labels if label is not None]


def _label_of(key: str) -> str | None:
    """None if it is not the key of a mark."""
    label = key.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    return label if key == _key(label) and _LABEL.fullmatch(label) else None


def _others(label: str, labels: list[str]) -> str:
    if not labels:
        return ", nor any other"
    hint = nearest(label, labels)
    if hint:
        return hint
    more = ", ..." if len(labels) > _NAMED_MAX else ""
    return f"; there are: {', '.join(labels[:_NAMED_MAX])}{more}"


def _parse(body: bytes, label: str) -> Mark:
    try:
        fields = json.loads(body)
        time_ms = parse_timestamp(fields["time"])
        if fields["label"] != label or time_ms is None:
            raise ValueError
        return Mark(label, parse_txid(fields["txid"]), time_ms)
    except (ValueError, TypeError, KeyError, AttributeError, FormatError):
        raise FormatError(f"the mark {label!r} cannot be read: make it anew") from None
