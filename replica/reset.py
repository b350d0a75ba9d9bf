"""Forgets what is recorded beside a database: it becomes its replica's next state, as it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .clock import Clock
from .election import InUseError
from .spool import Spool
from .sqlite import RefusedError

__all__ = ["closed_everywhere", "reset"]


def reset(directory: Path, clock: Clock, *, dry_run: bool = False) -> int:
    """Let the database whose state directory this is start anew.

    The next process that opens it ships a full copy behind whatever the replica holds then, unless
    that is page for page the same; nothing is deleted there.  Commits that were sealed here and not
    shipped are in the database.

    Args:
        dry_run: find out whether it can be done, and change nothing.

    Returns:
        The highest TXID that had been given here; 0 without a record.

    Raises:
        RefusedError: a process has the database open.
        SpoolError: the state directory cannot be written.
    """
    if dry_run and not directory.is_dir():
        return 0
    with _alone(directory, clock) as spool:
        state = spool.state
        fresh = replace(
            state.unproven(),
            lineage="",
            resync="it was reset",
            suspect=False,
            refusal=(),
            adopt=True,
        )
        if not dry_run:
            spool.record(fresh, drop_pieces=True, drop_segments=True)
        return state.txid


@contextmanager
def closed_everywhere(directory: Path, clock: Clock) -> Iterator[None]:
    """Keep the database whose state directory this is closed, while its file is replaced.

    Raises:
        RefusedError: a process has the database open.
        SpoolError: the state directory cannot be written.
    """
    if not os.path.isdir(directory):
        yield
        return
    with _alone(directory, clock):
        yield


@contextmanager
def _alone(directory: Path, clock: Clock) -> Iterator[Spool]:
    """The spool of a database that no process has open, and none can open meanwhile."""
    in_use = f"{directory} is in use: close the database in every process first"
    try:
        spool = Spool.open(directory, clock)
    except InUseError as error:
        raise RefusedError(in_use) from error
    try:
        if not spool.alone:
            raise RefusedError(in_use)
        yield spool
    finally:
        spool.close()
