"""A read transaction that is always open, so that nobody restarts the WAL unseen.

SQLite starts a WAL over only when all of it is in the main file and no read mark lies in it.  A
transaction that was begun on a WAL with frames not yet in the main file has such a mark.  One that
was begun when all frames were there has none, but keeps everybody from copying any frame, so that
no later WAL can be restarted either (SQLite's wal.c: marks 1 to 4, and mark 0).

Somebody who waits for our marks, in order to restart the WAL, can be let through: once all of it is
in the main file, and sealed, a newer transaction has no mark.  The WAL may then be begun anew once,
and what is written to that cannot be copied until `advance` (`give_way`).

So a newer transaction may take over from an older one whenever, after it has begun, there are
frames that are not in the main file yet.  There is no moment without one.
"""

from __future__ import annotations

from collections.abc import Callable

import apsw

from walship.replica.sqlite import SqlitePort

__all__ = ["Hold"]


class Hold:
    """Holds the WAL of one database.  Not thread-safe.

    Args:
        port: of the engine that ships it.
    """

    def __init__(self, port: SqlitePort) -> None:
        self._port = port
        self._reader: apsw.Connection | None = None
        self._mark = 0  # of the newest transaction, at least; frames

    def advance(self) -> None:
        """Let everything committed by now be copied into the main file, by whomever.

        Raises:
            apsw.Error: somebody was in the way; the older transaction stays, which is as safe.
        """
        before = self._port.published()
        if before is None or (self._reader is not None and before.mx_frame == self._mark):
            return
        newer = self._port.begin_reading()
        now = self._port.published()
        if self._reader is not None and (now is None or now.n_backfill == now.mx_frame):
            # It would hold nothing; but then the older one is as new.
            newer.close(True)
            return
        self._mark = before.mx_frame
        self._take_over(newer)

    def give_way(self, may_go: Callable[[int], bool]) -> bool:
        """Let somebody restart the WAL, once, if all of it is in the main file.

        Args:
            may_go: told how many frames it has, says whether it may go.

        Returns:
            Whether it may now.

        Raises:
            apsw.Error: somebody was in the way; the older transaction stays.
        """
        before = self._port.published()
        if before is None or not 0 < before.n_backfill == before.mx_frame:
            return False
        newer = self._port.begin_reading()
        # The older one has kept the WAL until here.
        if self._port.published() != before or not may_go(before.mx_frame):
            newer.close(True)
            return False
        self._mark = 0
        self._take_over(newer)
        return True

    def renew(self) -> None:
        """Hold the WAL that is about to begin.  Only while the caller keeps writers out.

        Raises:
            apsw.Error: somebody was in the way; nothing is held.
        """
        self.end()
        self._take_over(self._port.begin_reading())
        self._mark = 0

    def end(self) -> None:
        """Hold nothing any more."""
        self._take_over(None)

    def _take_over(self, newer: apsw.Connection | None) -> None:
        older, self._reader = self._reader, newer
        if older is not None:
            older.close(True)
