"""A snapshot made of the database's own pages, in place of a merge of all that the replica holds.

Nothing is read from the store, and nothing decompressed.  It is of the state that the record knows
when it begins, which may be later than the one that was asked for; what that state is, and why it
may be read beside an application that goes on writing, is the business of `replica.live`.  While
the pages are read, a read mark is held: no checkpoint gets past it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .clock import Clock
from .files import Files
from .format.checksum import BytesLike
from .format.ltx import Encoder, Header
from .format.types import LEVEL_SNAPSHOT
from .live import Live, at_txid, wait_replicated
from .merging import Made, Merge, put
from .store.base import ObjectStore, segment_key

__all__ = ["snapshot_live"]


def snapshot_live(
    job: Merge,
    store: ObjectStore,
    files: Files,
    clock: Clock,
    *,
    database: Path,
    directory: Path,
    may_put: Callable[[], object],
) -> Made:
    """Make the snapshot, and put it once the replica has all that it holds.

    Args:
        job: a snapshot of the newest state.
        store: the replica.
        database: no connection of this process may have it open.
        directory: its state directory.
        may_put: called before anything is sent; raises if this process may not change the replica.

    Raises:
        NotComparable: the database cannot be had at a TXID just now; nothing was sent.
        StoreError: a request failed.
        OSError: the file cannot be written.
    """
    with at_txid(database, directory, store.url, clock) as live:
        made = replace(
            job,
            max_txid=live.txid,
            # Whoever restores an earlier time must not begin with this.
            timestamp_ms=max(job.timestamp_ms, live.timestamp_ms),
            key=segment_key(store, LEVEL_SNAPSHOT, 1, live.txid),
        )
        sha256 = _write(made, live, files)
    wait_replicated(directory, live.txid, clock)
    may_put()
    return put(made, store, files, sha256)


def _write(job: Merge, live: Live, files: Files) -> str:
    """Write all pages to the file; returns its sha256, hex."""
    digest = hashlib.sha256()
    fd = files.open(job.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:

        def write(parts: Sequence[BytesLike]) -> None:
            data = b"".join(parts)
            digest.update(data)
            files.write(fd, [data])

        header = Header(
            page_size=live.page_size,
            commit=live.commit,
            min_txid=1,
            max_txid=job.max_txid,
            timestamp_ms=job.timestamp_ms,
        )
        encoder = Encoder(write, header, job.encoding)
        for first, run in live.page_runs():
            for pgno, page in enumerate(run, first):
                encoder.add_page(pgno, page)
        encoder.finish()
    finally:
        files.close(fd)
    return digest.hexdigest()
