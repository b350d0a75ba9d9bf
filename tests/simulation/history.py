"""What was committed in the simulation, and whether a database is a state that really was.

Every transaction writes the number of its own into the table ``steps`` and changes some ``cells``,
which ones and how is a function of that number.  So a database tells its whole history, and what
its other pages must hold.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import apsw

__all__ = ["History", "Violation"]

_CELLS = 24


class Violation(AssertionError):
    """A promise was broken."""


@dataclass
class _Commit:
    """One transaction.

    Attributes:
        outcome: "done" or "failed" as SQLite said; "unknown" as long as its writer was killed
            before that, and nobody has looked since; "either" if disks differ about it.
    """

    number: int
    parent: int
    who: str
    depth: int = 0
    outcome: str = "unknown"


class History:
    """All commits of one run."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._commits: list[_Commit] = [_Commit(0, 0, "nobody", outcome="done")]
        self._cells: dict[int, dict[int, tuple[int, bytes]]] = {0: {}}
        #: Commits that somebody was told are in the replica, and what told it.
        self.acknowledged: dict[int, str] = {}

    # -- writing ------------------------------------------------------------------------------

    def begin(self, parent: int, who: str) -> int:
        """The number of a commit that is about to be made on top of another."""
        number = len(self._commits)
        self._commits.append(_Commit(number, parent, who, self._commits[parent].depth + 1))
        return number

    def done(self, number: int) -> None:
        """SQLite has said that it is committed."""
        self._commits[number].outcome = "done"

    def failed(self, number: int) -> None:
        """SQLite has said that it is not."""
        self._commits[number].outcome = "failed"

    def look(self, newest: int, who: str) -> None:
        """A writer finds its machine's database ending with this commit.

        What is not there then never was a commit: SQLite has overwritten it, or is going to.
        """
        unknown = [c for c in self._commits if c.outcome == "unknown" and c.who == who]
        if unknown:
            line = set(self.line(newest))
            for commit in unknown:
                commit.outcome = "done" if commit.number in line else "failed"

    def copied(self, who: str) -> None:
        """The disk of a machine was copied: what is not decided yet may end differently there."""
        for commit in self._commits:
            if commit.outcome == "unknown" and commit.who == who:
                commit.outcome = "either"

    @staticmethod
    def make_tables(connection: apsw.Connection) -> None:
        """Inside a transaction."""
        connection.execute("CREATE TABLE IF NOT EXISTS steps (n INTEGER PRIMARY KEY, id INTEGER)")
        connection.execute("CREATE TABLE IF NOT EXISTS cells (k INTEGER PRIMARY KEY, n, pad)")

    def write(self, connection: apsw.Connection, number: int) -> None:
        """The statements of a commit, inside a transaction."""
        for key, pad in self._changes(number).items():
            if pad is None:
                connection.execute("DELETE FROM cells WHERE k = ?", (key,))
            else:
                connection.execute("REPLACE INTO cells VALUES (?, ?, ?)", (key, number, pad))
        connection.execute("INSERT INTO steps (id) VALUES (?)", (number,))

    def _changes(self, number: int) -> dict[int, bytes | None]:
        rng = random.Random(f"{self._seed}/{number}")
        changes: dict[int, bytes | None] = {}
        for _ in range(rng.choice((1, 1, 1, 2, 6))):
            size = rng.choice((10, 100, 1500))
            changes[rng.randrange(_CELLS)] = None if rng.random() < 0.15 else rng.randbytes(size)
        return changes

    @staticmethod
    def tail(connection: apsw.Connection) -> int:
        """The newest commit that a database holds; 0 for none."""
        if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'steps'").fetchall():
            return 0
        rows = connection.execute("SELECT id FROM steps ORDER BY n DESC LIMIT 1").fetchall()
        return int(rows[0][0]) if rows else 0

    # -- judging ------------------------------------------------------------------------------

    def acknowledge(self, number: int, how: str) -> None:
        """Somebody was told that this commit, and all before it, is in the replica."""
        if number:
            self.acknowledged.setdefault(number, how)

    @property
    def count(self) -> int:
        """Commits that were begun."""
        return len(self._commits) - 1

    def depth(self, number: int) -> int:
        """How many commits a commit rests on, itself included."""
        return self._commits[number].depth

    def line(self, number: int) -> list[int]:
        """A commit and all that it rests on, oldest first."""
        line = []
        while number:
            line.append(number)
            number = self._commits[number].parent
        return line[::-1]

    def judge(self, path: Path) -> int:
        """The newest commit of a complete database file.

        Raises:
            Violation: it is no state that somebody committed.
        """
        if not path.exists() or path.stat().st_size == 0:
            return 0
        connection = apsw.Connection(
            f"file:{path}?immutable=1",
            flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI,
            vfs="unix",
        )
        try:
            return self._judge(connection)
        except apsw.Error as error:
            raise Violation(f"a state of the replica is damaged: {error}") from error
        finally:
            connection.close(True)

    def _judge(self, connection: apsw.Connection) -> int:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
        if not tables:
            return 0
        steps = [n for (n,) in connection.execute("SELECT id FROM steps ORDER BY n")]
        if not steps:
            raise Violation("a state of the replica has tables and no commit")
        newest = steps[-1]
        if not 0 < newest < len(self._commits):
            raise Violation(f"a state of the replica ends with a commit {newest} of nobody")
        if steps != self.line(newest):
            raise Violation(
                f"a state of the replica holds commits {steps}, but {newest} was made on top of "
                f"{self.line(newest)[:-1]}"
            )
        failed = [n for n in steps if self._commits[n].outcome == "failed"]
        if failed:
            raise Violation(f"a state of the replica holds commits that failed: {failed}")
        found = {k: (n, pad) for k, n, pad in connection.execute("SELECT k, n, pad FROM cells")}
        expected = self._expected(newest)
        if found != expected:
            wrong = [k for k in range(_CELLS) if found.get(k) != expected.get(k)]
            raise Violation(f"a state of the replica, after commit {newest}: cells {wrong} differ")
        findings = connection.execute("PRAGMA integrity_check").fetchall()
        if findings != [("ok",)]:
            raise Violation(f"a state of the replica is damaged: {findings[:3]}")
        return newest

    def _expected(self, number: int) -> dict[int, tuple[int, bytes]]:
        for each in self.line(number):
            if each not in self._cells:
                cells = dict(self._cells[self._commits[each].parent])
                for key, pad in self._changes(each).items():
                    if pad is None:
                        cells.pop(key, None)
                    else:
                        cells[key] = (each, pad)
                self._cells[each] = cells
        return self._cells[number]

    def missing(self, newest: int) -> list[int]:
        """Acknowledged commits that a state which ends with ``newest`` does not hold."""
        line = set(self.line(newest))
        return sorted(number for number in self.acknowledged if number not in line)
