"""The live database as it was at one TXID, seen from a process that does not have it open.

`replica.verify` holds it against what the replica gives, `replica.snapshots` makes snapshots of it.
Two ways lead there:

* Some process uploads.  A read mark is taken first: as long as it is held no checkpoint writes
  anything into the main file that came after it, and no WAL goes that it needs.  Then that process
  is asked to seal what there is, and the record (`spool`) says which TXID that became and where in
  the WAL it ends.  As this lies at or behind the mark, the frames up to there, over the main file,
  are the database at that TXID, to the byte, however many commits have followed.
* Nobody has it open.  Then the files are read as they lie, if the record ends where they end, and
  their times tell whether somebody came by meanwhile.

Nothing is written but a named pipe in the state directory, which is removed again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .clock import Clock
from .errors import FormatError, ReplicaError
from .files import OS_FILES, Files
from .format.types import WalSalts, lock_pgno
from .frames import Batch, WalReader, collect, page_runs
from .peers import Pipe, read_leader
from .spool import Fingerprint, State, WalPosition, read_state
from .sqlite import SqlitePort, connections_to

__all__ = ["Live", "NotComparable", "at_txid", "replicated_txid", "wait_replicated"]

#: How long the process that uploads may take to seal what there is, seconds.
_SEAL_S: Final = 30.0
#: How long it may take then until the replica has it, seconds.
_SHIP_S: Final = 120.0
#: Pauses between two looks at the record: the first, and the longest, seconds.
_PAUSE_FIRST_S: Final = 0.005
_PAUSE_LONGEST_S: Final = 0.2
#: Attempts at a read mark beside busy writers.
_MARK_ATTEMPTS: Final = 50
#: A file that changed less than this ago can change again without a sign, seconds.
_SETTLE_S: Final = 0.02
#: The mark keeps the WAL from being started over.  It is given up when that has grown so much.
_WAL_GROWTH_BYTES: Final = 256 * 1024 * 1024
#: How often that is looked at: after so many bytes of pages.
_LOOK_BYTES: Final = 16 * 1024 * 1024


class NotComparable(ReplicaError):
    """There is no state of the database that can be held against the replica just now."""


@dataclass(slots=True)
class Live:
    """The database at a TXID; usable inside the context of `at_txid`.

    Attributes:
        txid: the state that it is.
        timestamp_ms: when that was committed, ms since the epoch.
        page_size: bytes.
        commit: size in pages.
    """

    txid: int
    timestamp_ms: int
    page_size: int
    commit: int
    _wal: WalReader
    _batch: Batch
    _read_main: Callable[[int, int], bytes]
    _check: Callable[[], None]

    def page_runs(self) -> Iterator[tuple[int, list[memoryview]]]:
        """All pages but the lock page, ascending: number of the first of a run, and their content.

        Raises:
            NotComparable: the view was lost, or had to be given up; what came before is void.
        """
        n_bytes = 0
        try:
            for pgno, run in page_runs(self._wal, self._batch, self.page_size, self._read_main):
                yield pgno, run
                n_bytes += len(run) * self.page_size
                if n_bytes >= _LOOK_BYTES:
                    n_bytes = 0
                    self._check()
        except FormatError as error:
            raise NotComparable(f"the WAL was replaced while it was read ({error})") from error
        self._check()


def replicated_txid(directory: Path, url: str) -> int:
    """Highest TXID that a replica has, as a state directory tells; 0 if it tells of none."""
    try:
        state = read_state(directory)
    except (ReplicaError, OSError):
        return 0
    return state.acked_txid if state is not None and state.replica == url else 0


@contextlib.contextmanager
def at_txid(path: Path, directory: Path, url: str, clock: Clock) -> Iterator[Live]:
    """The database at a TXID that its record knows; not necessarily in the replica yet.

    Args:
        path: the database; no connection of this process may have it open.
        directory: its state directory.
        url: of the replica; the record must be about this one.

    Raises:
        NotComparable: saying why there is no such state.
    """
    if connections_to(str(path)):
        raise NotComparable("this process has the database open itself")
    if not path.exists():
        raise NotComparable(f"there is no database {path} here")
    state = _state(directory)
    if state.replica != url:
        raise NotComparable(
            f"the record beside {path} is of {state.replica or 'no replica'}, not of {url}"
        )
    source = _Files(path, directory, clock)
    try:
        with source.running() as live:
            if live is not None:
                yield live
                return
        yield source.idle()
    finally:
        source.close()


def wait_replicated(directory: Path, txid: int, clock: Clock) -> None:
    """Wait until the record says that the replica has a TXID.

    Raises:
        NotComparable: it does not get there in time.
    """
    if not _wait(lambda: _state(directory).acked_txid >= txid, _SHIP_S, clock):
        raise NotComparable(
            f"the newest changes did not get into the replica within {_SHIP_S:.0f} s (see `walship "
            "status`)"
        )


class _Files:
    """The files of one database, as another process finds them."""

    def __init__(self, path: Path, directory: Path, clock: Clock, files: Files = OS_FILES) -> None:
        self._path = path
        self._directory = directory
        self._clock = clock
        self._files = files
        self._wal = WalReader(f"{path}-wal", files)
        self._main = -1

    def close(self) -> None:
        self._wal.close()
        if self._main >= 0:
            os.close(self._main)

    # -- some process uploads -----------------------------------------------------------------

    @contextlib.contextmanager
    def running(self) -> Iterator[Live | None]:
        """As `at_txid`; None if no process uploads the database."""
        with self._ask_to_seal() as ask:
            if not ask():
                yield None
                return
            port = SqlitePort(str(self._path))
            try:
                with self._marked(port) as mark:
                    check_growth = self._growth()
                    ask()
                    state = self._sealed_behind(mark, port, check_growth)
                    yield self._live(state, port.read_main, self._bounded(state, check_growth))
            finally:
                port.release()

    @contextlib.contextmanager
    def _ask_to_seal(self) -> Iterator[Callable[[], bool]]:
        """Asks the process that uploads to ship what is committed; false if there is none."""
        leader = read_leader(self._files, self._directory)
        if leader is None:
            yield lambda: False
            return
        try:
            pipe = Pipe(self._files, self._directory)
        except OSError as error:
            raise NotComparable(
                f"cannot write in {self._directory} ({error.strerror}): run this as the user of "
                "the application"
            ) from error
        try:
            yield lambda: pipe.send(leader, {"op": "sync", "from": pipe.name, "id": 1})
        finally:
            pipe.close()

    @contextlib.contextmanager
    def _marked(self, port: SqlitePort) -> Iterator[tuple[WalSalts | None, int]]:
        """Hold a read mark: salts of the WAL, and a frame of it that lies at or behind the mark."""
        for _ in range(_MARK_ATTEMPTS):
            with port.read_view(lambda mx_frame, is_still: True) as view:
                salts = self._wal.salts()
                published = port.published() if view is not None else None
                # Salts that differ: SQLite is about to start the WAL over.
                is_live = salts is None or port.index_salts() == salts
                if published is not None and is_live and self._wal.salts() == salts:
                    yield salts, published.mx_frame
                    return
            self._clock.sleep(_PAUSE_LONGEST_S / 10)
        raise NotComparable("the database is in use all the time: no read transaction came about")

    def _sealed_behind(
        self, mark: tuple[WalSalts | None, int], port: SqlitePort, check_growth: Callable[[], None]
    ) -> State:
        """The record, once all that lies before the mark has its TXID."""
        found: list[State] = []

        def look() -> bool:
            check_growth()
            state = _state(self._directory)
            if self._is_behind(state, mark, port):
                found.append(state)
            return bool(found)

        if not _wait(look, _SEAL_S, self._clock):
            raise NotComparable(
                f"the process that uploads did not seal what is new within {_SEAL_S:.0f} s (see "
                "`walship status`)"
            )
        return found[0]

    def _is_behind(self, state: State, mark: tuple[WalSalts | None, int], port: SqlitePort) -> bool:
        """Whether all up to the position in a record, and nothing else, is in its TXID."""
        if not _is_settled(state):
            return False
        salts, frame = mark
        now = self._wal.salts()
        if state.position is None:
            # All is in the main file, which nobody writes to while the mark is held.
            return now is None and self._is_unchanged(state)
        if state.position.salts != now or port.index_salts() != now:
            return False
        # In a WAL that was begun since, everything lies behind the mark.
        return now != salts or state.position.frame >= frame

    def _bounded(self, state: State, check_growth: Callable[[], None]) -> Callable[[], None]:
        """Checks that the WAL is what it was, and that holding the mark does not cost too much."""
        salts = self._wal.salts()

        def check() -> None:
            if self._wal.salts() != salts and (salts is not None or state.position is not None):
                raise NotComparable("the WAL was replaced while the database was read")
            check_growth()

        return check

    def _growth(self) -> Callable[[], None]:
        """Checks that the WAL has not grown by too much from now on."""
        begun = self._wal_bytes()

        def check() -> None:
            if self._wal_bytes() > begun + _WAL_GROWTH_BYTES:
                raise NotComparable(
                    "there are too many changes for a comparison: the WAL grew by "
                    f"{_WAL_GROWTH_BYTES >> 20} MiB while the database was read"
                )

        return check

    def _wal_bytes(self) -> int:
        try:
            return os.stat(self._wal.path).st_size
        except FileNotFoundError:
            return 0

    # -- nobody has it open -------------------------------------------------------------------

    def idle(self) -> Live:
        """The files as they lie.

        Raises:
            NotComparable: they hold more or other than what the record says.
        """
        state = _state(self._directory)
        if not _is_settled(state) or state.segments:
            raise NotComparable(
                "not everything is in the replica yet: open the database in the application, which "
                "ships the rest"
            )
        while self._age_s() < _SETTLE_S:
            self._clock.sleep(_SETTLE_S)
        before = Fingerprint.of(self._path)
        header = self._wal.header()
        if state.position is None or header is None:
            if header is not None or not self._is_unchanged(state):
                raise NotComparable(_CHANGED)
        elif header.salts != state.position.salts:
            raise NotComparable(_CHANGED)
        elif self._goes_on(state.position, header.page_size):
            raise NotComparable(
                "the WAL holds commits that were not shipped: open the database in the "
                "application, which ships them"
            )

        def check() -> None:
            if Fingerprint.of(self._path) != before or self._wal.header() != header:
                raise NotComparable("the database was changed while it was read")

        self._main = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return self._live(state, self._read_main, check)

    def _goes_on(self, position: WalPosition, page_size: int) -> bool:
        frame = self._wal.frame(position.frame + 1, page_size)
        return frame is not None and frame.salts == position.salts

    def _read_main(self, offset: int, length: int) -> bytes:
        return os.pread(self._main, length, offset).ljust(length, b"\0")

    def _age_s(self) -> float:
        found = Fingerprint.of(self._path)
        return self._clock.now_ms() / 1e3 - max(found.mtime_ns, found.ctime_ns) / 1e9

    # -- both ---------------------------------------------------------------------------------

    def _is_unchanged(self, state: State) -> bool:
        """Whether the main file is what it was when there was no WAL last."""
        try:
            return state.wal_gone and state.fingerprint == Fingerprint.of(self._path)
        except FileNotFoundError:
            return False

    def _live(
        self, state: State, read_main: Callable[[int, int], bytes], check: Callable[[], None]
    ) -> Live:
        frame = state.position.frame if state.position is not None else 0
        newest: dict[int, int] = {}
        if frame:
            try:
                overlay = collect(self._wal, 0, frame, state.page_size)
            except FormatError as error:
                raise NotComparable(f"the WAL ends before its record: {error}") from error
            newest = {key >> 32: key for key in overlay.keys}
        locked = lock_pgno(state.page_size)
        keys = (newest.get(n, n << 32) for n in range(1, state.commit + 1) if n != locked)
        batch = Batch(1, frame, keys, state.commit, (0, 0), None)
        return Live(
            state.txid,
            state.timestamp_ms,
            state.page_size,
            state.commit,
            self._wal,
            batch,
            read_main,
            check,
        )


_CHANGED: Final = (
    "the database was changed by another program since it was shipped last: open it in the "
    "application, which ships what differs"
)


def _is_settled(state: State) -> bool:
    """Whether a record's position is that of its newest TXID."""
    return bool(
        state.txid
        and state.commit
        and state.page_size
        and not (state.pieces or state.copying or state.resync or state.set_aside)
    )


def _state(directory: Path) -> State:
    try:
        state = read_state(directory)
    except (ReplicaError, OSError) as error:
        raise NotComparable(f"the record in {directory} cannot be read: {error}") from error
    if state is None or not state.txid:
        raise NotComparable(f"{directory} has no record of what was replicated")
    return state


def _wait(is_done: Callable[[], bool], limit_s: float, clock: Clock) -> bool:
    deadline = clock.monotonic() + limit_s
    pause = _PAUSE_FIRST_S
    while not is_done():
        if clock.monotonic() >= deadline:
            return False
        clock.sleep(pause)
        pause = min(2 * pause, _PAUSE_LONGEST_S)
    return True
