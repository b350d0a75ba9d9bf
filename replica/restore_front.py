"""Restore as people ask for it: a replica by URL or settings, a time in words, a progress bar.

Between the command line or an application and `replica.restore`, which does the work.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from .check import IntegrityMode
from .clock import SystemClock
from .config.sources import parse_replica
from .config.values import parse_duration, parse_int
from .errors import ConfigError, FormatError, NoBackupError, RestoreError
from .follow import Step, follow, update
from .format.types import parse_txid
from .marks import find_mark
from .plan import format_time
from .reset import closed_everywhere
from .restore import Progress, RestoreResult, output_file, restore
from .spool import state_directory
from .store.base import ObjectStore
from .store.opening import open_store
from .store.retrying import RetryingStore
from .store.timestamps import parse_timestamp

__all__ = [
    "follow_from",
    "labelled",
    "parse_time",
    "progress_bar",
    "refuse_replicated",
    "restore_from",
    "update_from",
]

#: Words for units of time, singular, in seconds.
_TIME_UNITS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("s", "sec", "second"), 1),
    **dict.fromkeys(("m", "min", "minute"), 60),
    **dict.fromkeys(("h", "hour"), 3600),
    **dict.fromkeys(("d", "day"), 86_400),
    **dict.fromkeys(("w", "week"), 604_800),
}
_LONG_AGO_S: Final = 1e10  # before anybody had a database; times that far back cannot be printed
_WORDS_RE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.ASCII)
_FINE_RE: Final = re.compile(r"\.\d{3}\d*[1-9]")


def restore_from(
    replica: str | os.PathLike[str] | Mapping[str, object],
    output: str | os.PathLike[str],
    *,
    txid: int | str | None = None,
    timestamp: datetime | str | float | None = None,
    label: str | None = None,
    parallelism: int = 8,
    progress: bool | Progress = False,
    integrity_check: IntegrityMode = "none",
    verify: Literal["auto", "full"] = "auto",
    overwrite: bool = False,
    **settings: Any,
) -> RestoreResult:
    """Restore a database from a replica to a file.

    The file appears under its name complete and synced, or not at all; whatever was there before
    is untouched until then.

    Args:
        replica: URL, directory, or mapping of replica settings.
        output: the database file to make.
        txid: restore exactly this TXID (a number, or 16 hex digits); the newest state without it.
        timestamp: restore the newest state strictly before this: a datetime (naive ones are local
            time), seconds since the epoch, RFC 3339 text, or relative text such as "-15m".
        label: restore the state that was given this label (`Replication.mark`).
        parallelism: requests under way at once, at least 1.
        progress: True for a bar on standard error if that is a terminal, or a function that is
            called with (bytes fetched so far, bytes expected).
        integrity_check: "none", "quick" or "full": have SQLite check the file before it appears.
        verify: "full" reads and verifies even what is outdated; see `replica.restore.restore`.
        overwrite: replace an existing database, which nobody may have open; one that walship
            replicates is refused while it is.
        **settings: any replica setting of the configuration file, with underscores.

    Raises:
        ConfigError: a setting or argument cannot be used.
        RefusedError: the output is a database that is open and being replicated.
        RestoreError: it could not be done; see its subclasses.
        FormatError: the replica is damaged.
        StoreError: the replica could not be read.
    """
    clock = SystemClock()
    target = output_file(output)
    target_ms = None if timestamp is None else _milliseconds(timestamp, clock.now_ms())
    with (
        closed_everywhere(state_directory(target), clock),
        _opened(replica, settings, clock, progress, output) as (store, report),
        labelled(store, label, _txid(txid), target_ms) as chosen_txid,
    ):
        return restore(
            store,
            output,
            clock=clock,
            txid=chosen_txid,
            timestamp_ms=target_ms,
            parallelism=parallelism,
            integrity_check=integrity_check,
            verify=verify,
            progress=report,
            overwrite=overwrite,
        )


@contextlib.contextmanager
def labelled(
    store: ObjectStore, label: str | None, txid: int | None, timestamp_ms: int | None
) -> Iterator[int | None]:
    """The TXID to restore: that of a mark if a label is given, else ``txid``.

    Raises:
        ConfigError: more than one target, or no such mark.
        NoBackupError: there is no replica; or, out of the context, the mark's state is gone.
    """
    if label is None:
        yield txid
        return
    if txid is not None or timestamp_ms is not None:
        raise ConfigError("give a label, a TXID or a timestamp to restore to, not several")
    mark = find_mark(store, label)
    try:
        yield mark.txid
    except NoBackupError as error:
        raise RestoreError(
            f"the state marked {label!r} at {format_time(mark.time_ms)} is gone: {error}"
        ) from error


def update_from(
    replica: str | os.PathLike[str] | Mapping[str, object],
    output: str | os.PathLike[str],
    *,
    txid: int | str | None = None,
    timestamp: datetime | str | float | None = None,
    label: str | None = None,
    parallelism: int = 8,
    progress: bool | Progress = False,
    overwrite: bool = False,
    **settings: Any,
) -> Step:
    """Bring a copy of a database up to date by fetching only what changed since.

    The first call restores the output and writes ``<output>-txid`` beside it, which says what it
    holds.  Later ones apply what the replica got since, as one transaction, or a few: readers may
    have the output open, see each of its states whole, and must not write to it.  Killed at any
    point this leaves a state of the replica, and the next call goes on from there.

    Args: as for `restore_from`; ``overwrite`` restores anew whatever is there.

    Raises:
        OutputExistsError: the output exists without the note.
        ContinuityError: somebody has written to the output, or the replica was reset.
        RestoreError: the output is newer than the target.
        ReplicaError: as `restore_from`.
    """
    clock = SystemClock()
    refuse_replicated(output)
    target_ms = None if timestamp is None else _milliseconds(timestamp, clock.now_ms())
    with (
        _opened(replica, settings, clock, progress, output) as (store, report),
        labelled(store, label, _txid(txid), target_ms) as chosen_txid,
    ):
        return update(
            store,
            output,
            clock=clock,
            txid=chosen_txid,
            timestamp_ms=target_ms,
            parallelism=parallelism,
            progress=report,
            overwrite=overwrite,
        )


def follow_from(
    replica: str | os.PathLike[str] | Mapping[str, object],
    output: str | os.PathLike[str],
    *,
    interval: float | str = 1.0,
    stop: threading.Event | None = None,
    on_step: Callable[[Step], object] | None = None,
    parallelism: int = 8,
    progress: bool | Progress = False,
    overwrite: bool = False,
    **settings: Any,
) -> int:
    """Keep a copy of a database at the newest state of its replica; blocks until it is stopped.

    The output is made and changed as by `update_from`.  Each look costs one LIST request, and each
    new segment two HEADs and a GET.  A store that does not answer is waited for.  In this process
    read the output with apsw, not with the sqlite3 module, which would drop the locks on it.

    Args:
        interval: between two looks: seconds, or text such as "500ms".
        stop: set it to end; without one only an error or Ctrl-C does.
        on_step: called in this thread with every state that was reached.
        parallelism, progress, overwrite, settings: as for `restore_from`.

    Returns:
        The TXID that the output holds.

    Raises:
        ReplicaError: as `update_from`, also later on.
    """
    clock = SystemClock()
    refuse_replicated(output)
    interval_s = parse_duration("interval", interval)
    event = threading.Event() if stop is None else stop
    with _opened(replica, settings, clock, progress, output) as (store, report):
        return follow(
            store,
            output,
            clock=clock,
            wait=event.wait,
            interval_s=interval_s,
            on_step=on_step,
            parallelism=parallelism,
            progress=report,
            overwrite=overwrite,
        )


def refuse_replicated(output: str | os.PathLike[str]) -> None:
    """Refuse an output that an application replicates: only walship's VFS may write to that.

    Raises:
        ConfigError: it has a state directory.
    """
    directory = state_directory(Path(os.path.realpath(output_file(output))))
    if os.path.lexists(directory):
        raise ConfigError(
            f"{output} is a database that is replicated itself ({directory.name} lies beside it):"
            " choose another output"
        )


@contextlib.contextmanager
def _opened(
    replica: str | os.PathLike[str] | Mapping[str, object],
    settings: Mapping[str, Any],
    clock: SystemClock,
    progress: bool | Progress,
    output: str | os.PathLike[str],
) -> Iterator[tuple[ObjectStore, Progress | None]]:
    parsed = parse_replica(replica, **settings)
    with (
        closing(RetryingStore(open_store(parsed.store, clock), clock)) as store,
        _progress(progress, os.path.basename(os.fspath(output))) as report,
    ):
        yield store, report


def _txid(txid: int | str | None) -> int | None:
    if txid is None:
        return None
    try:
        number = parse_txid(txid.lower()) if isinstance(txid, str) else parse_int("txid", txid)
    except FormatError as error:
        raise ConfigError(f"txid: {error}") from None
    if number < 0:
        raise ConfigError(f"txid: {number} is none: they count from 1")
    return number


def _milliseconds(timestamp: datetime | str | float, now_ms: int) -> int:
    if isinstance(timestamp, datetime):
        # Whole milliseconds, and one more for what is finer: "before" then includes all before it.
        try:
            since = timestamp.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
        except (OverflowError, ValueError, OSError):
            raise ConfigError(f"timestamp: {timestamp} cannot be told in UTC") from None
        fine = since.microseconds % 1000 > 0
        return (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000 + fine
    if isinstance(timestamp, str):
        return parse_time(timestamp, now_ms)
    if not isinstance(timestamp, int | float) or not math.isfinite(timestamp):
        raise ConfigError(f"timestamp: not a time: {timestamp!r} (a datetime, seconds, or text)")
    return round(timestamp * 1000)


@contextlib.contextmanager
def _progress(progress: bool | Progress, name: str) -> Iterator[Progress | None]:
    if callable(progress):
        yield progress
    elif progress:
        with progress_bar(name) as bar:
            yield bar
    else:
        yield None


def parse_time(text: str, now_ms: int) -> int:
    """A time as ms since the epoch: RFC 3339, or relative to now ("-15m", "5 minutes ago").

    Raises:
        ConfigError: it is neither.
    """
    stripped = text.strip()
    absolute = parse_timestamp(stripped.replace(" ", "T", 1))
    if absolute is not None:
        # "Strictly before" must include what happened earlier in the same millisecond.
        return absolute + (_FINE_RE.search(stripped) is not None)
    words = stripped.lower()
    if words.startswith("-"):
        words = words[1:].strip()
    elif words.endswith("ago"):
        words = words[:-3].strip()
    else:
        words = ""
    seconds = _relative_s(words)
    if seconds is None:
        raise ConfigError(
            f"-timestamp: not a time: {text!r} (2026-01-31T15:54:00Z, with Z or +01:00 at its end,"
            ' or "-15m", or "5 minutes ago")'
        )
    return now_ms - round(seconds * 1000)


def _relative_s(words: str) -> float | None:
    if not words:
        return None
    with contextlib.suppress(ConfigError):
        return parse_duration("timestamp", words)
    seconds = 0.0
    for number, unit in _WORDS_RE.findall(words):
        size = _TIME_UNITS.get(unit) or _TIME_UNITS.get(unit.removesuffix("s"))
        if size is None:
            return None
        seconds += float(number) * size
    rest = _WORDS_RE.sub("", words).replace("and", "").replace(",", "").strip()
    return seconds if not rest and 0 < seconds < _LONG_AGO_S else None


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Progress | None]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(
        desc=name, unit="B", unit_scale=True, unit_divisor=1000, leave=False, file=sys.stderr
    ) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
