"""How a database stands, seen from outside the processes that have it open.

By the word of the process that uploads, if one answers; else by what lies beside the database and
in its replica.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from .clock import Clock
from .config.settings import ReplicaSettings
from .errors import ConfigError, ReplicaError
from .files import Files
from .listing import list_replica
from .peers import ask_leader, read_leader
from .spool import read_state
from .store.opening import open_store
from .store.retrying import RetryingStore
from .uploader import error_of

__all__ = ["Overview", "Running", "ask_running", "look_at"]

Word = Literal["ok", "not initialized", "no database", "error"]

#: States of a running engine, in Litestream's words for `status`.
_WORDS: Final[Mapping[str, Word]] = {"opening": "ok", "ok": "ok"}


@dataclass(frozen=True, kw_only=True)
class Running:
    """What the process that uploads a database says.

    Attributes:
        pid: its process id.
        state: "opening", "ok", "retrying" or "stopped".
        txid: highest TXID given; 0 before the first.
        replicated_txid: highest TXID in the replica; 0 if that is empty.
        lag_s: age of the oldest commit that is not in the replica, seconds.
        last_upload_ms: when the last upload since the database was opened arrived, milliseconds
            since the Unix epoch, or None.
        last_error: the present trouble in one line, or None.
    """

    pid: int
    state: str
    txid: int
    replicated_txid: int
    lag_s: float
    last_upload_ms: int | None
    last_error: str | None


@dataclass(frozen=True, kw_only=True)
class Overview:
    """How a database stands.

    Attributes:
        word: "ok", "not initialized" (nothing is recorded beside it), "no database", or "error".
        state: that of the process that uploads (see `Running`); "not open" if there is none, or
            None if the database was never replicated from here.
        txid: highest TXID recorded here; 0 if none.
        replicated_txid: highest TXID in the replica; 0 if it is empty, or nobody knows.
        lag_s: age of the oldest commit that is not in the replica, seconds; None if nobody knows.
        wal_bytes: size of the ``-wal`` file; None without a database.
        problem: what is wrong, or what could not be found out.
    """

    word: Word
    state: str | None = None
    txid: int = 0
    replicated_txid: int = 0
    lag_s: float | None = None
    wal_bytes: int | None = None
    problem: ReplicaError | None = None


def ask_running(directory: Path, timeout_s: float) -> Running | None:
    """Ask the process that uploads the database with this state directory; no request is made.

    Args:
        timeout_s: how long to wait for its answer, seconds.

    Returns:
        Its answer; None if no process has the database open, or none answers in time.
    """
    try:
        answer = ask_leader(Files(), directory, {"op": "status"}, timeout_s)
        leader = read_leader(Files(), directory)
    except OSError:
        return None  # no state directory, or not ours to write to
    status = (answer or {}).get("status")
    if not isinstance(status, dict) or leader is None:
        return None
    names = [name for name in Running.__dataclass_fields__ if name != "pid"]
    try:
        # The pipe is named after its process.
        values: dict[str, Any] = {name: status[name] for name in names}
        return Running(pid=int(leader.partition("-")[0]), **values)
    except (KeyError, ValueError):  # another version of this library
        return None


def look_at(
    path: Path, directory: Path, replica: ReplicaSettings | None, clock: Clock, timeout_s: float
) -> Overview:
    """How the database at ``path`` stands.  The replica is asked only where no process answers.

    Args:
        directory: its state directory.
        replica: where it is shipped to, if that is known.
        timeout_s: how long to wait for the process that uploads, seconds.
    """
    wal_bytes = _wal_bytes(path)
    running = ask_running(directory, timeout_s)
    if running is not None:
        error = running.last_error
        return Overview(
            word=_WORDS.get(running.state, "error"),
            state=running.state,
            txid=running.txid,
            replicated_txid=running.replicated_txid,
            lag_s=running.lag_s,
            wal_bytes=wal_bytes,
            problem=None if error is None else ReplicaError(f"{path}: {error}"),
        )
    word: Word = "no database" if wal_bytes is None else "not initialized"
    state, txid, replicated_txid = None, 0, 0
    problem: ReplicaError | None = None
    try:
        recorded = read_state(directory)
    except (ReplicaError, OSError) as failure:
        word = "error"
        problem = failure if isinstance(failure, ReplicaError) else ConfigError(str(failure))
    else:
        if recorded is not None and len(recorded.refusal) == 2:
            kind, text = recorded.refusal
            word, problem = "error", error_of(kind, f"{path}, when it was last open: {text}")
        if recorded is not None and recorded.txid:
            txid = recorded.txid
            if wal_bytes is not None:
                word, state = ("error" if problem else "ok"), "not open"
    if replica is not None:
        try:
            with closing(RetryingStore(open_store(replica.store, clock), clock)) as store:
                replicated_txid = max((each.max_txid for each in list_replica(store)), default=0)
        except ReplicaError as failure:
            word, problem = "error", problem or failure
    return Overview(
        word=word,
        state=state,
        txid=txid,
        replicated_txid=replicated_txid,
        wal_bytes=wal_bytes,
        problem=problem,
    )


def _wal_bytes(path: Path) -> int | None:
    if not path.exists():
        return None
    try:
        return Path(f"{path}-wal").stat().st_size
    except OSError:
        return 0
