"""A history of transactions that anybody can check: what the database holds after each is known.

Transaction ``n`` is a function of the seed and ``n``.  A database that holds the history up to some
``n`` exactly, and nothing else, is a prefix; `History.length` says of which length.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import apsw

from walship.replica.check import integrity_check

_BALLAST_ROWS = 64


class NotAPrefix(AssertionError):
    """A database holds something that is not the history up to any transaction."""


class History:
    """Deterministic transactions 0, 1, 2 ...; transaction 0 makes the tables.

    Args:
        seed: chooses the history.
        ballast_bytes: incompressible content that only transaction 0 writes, so that a full copy
            is much larger than anything incremental.
        cells: how many rows there are to change.
        changes: how many of them a transaction changes, one of these.
        sizes: bytes of a row, one of these.
    """

    def __init__(
        self,
        seed: int = 0,
        ballast_bytes: int = 0,
        *,
        cells: int = 48,
        changes: Sequence[int] = (1, 1, 2, 5, 12),
        sizes: Sequence[int] = (10, 300, 5_000),
    ) -> None:
        self.seed = seed
        self.ballast_bytes = ballast_bytes
        self.cells = cells
        self.changes = changes
        self.sizes = sizes

    def apply(self, connection: apsw.Connection, n: int) -> None:
        """Run transaction ``n``; committed when this returns."""
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._apply(connection, n)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _apply(self, connection: apsw.Connection, n: int) -> None:
        if n == 0:
            connection.execute("CREATE TABLE steps (n INTEGER PRIMARY KEY)")
            connection.execute("CREATE TABLE cells (k INTEGER PRIMARY KEY, v INTEGER, pad BLOB)")
            connection.execute("CREATE INDEX by_value ON cells (v)")
            connection.execute("CREATE TABLE ballast (id INTEGER PRIMARY KEY, content BLOB)")
            rng = random.Random(self.seed)
            for row in range(_BALLAST_ROWS if self.ballast_bytes else 0):
                content = rng.randbytes(self.ballast_bytes // _BALLAST_ROWS)
                connection.execute("INSERT INTO ballast VALUES (?, ?)", (row, content))
        for key, pad in self._changes(n).items():
            if pad is None:
                connection.execute("DELETE FROM cells WHERE k = ?", (key,))
            else:
                connection.execute("REPLACE INTO cells VALUES (?, ?, ?)", (key, n, pad))
        connection.execute("INSERT INTO steps VALUES (?)", (n,))

    def _changes(self, n: int) -> dict[int, bytes | None]:
        rng = random.Random(f"{self.seed}/{n}")
        changes: dict[int, bytes | None] = {}
        for _ in range(rng.choice(self.changes)):
            key = rng.randrange(self.cells)
            size = rng.choice(self.sizes)
            changes[key] = None if rng.random() < 0.2 else rng.randbytes(size)
        return changes

    def length(self, connection: apsw.Connection) -> int:
        """How many transactions of the history the database holds.

        Raises:
            NotAPrefix: it holds anything else than a prefix.
        """
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
        if "steps" not in tables:
            if tables:
                raise NotAPrefix(f"tables {tables} without `steps`")
            return 0
        steps = [n for (n,) in connection.execute("SELECT n FROM steps ORDER BY n")]
        if steps != list(range(len(steps))) or not steps:
            raise NotAPrefix(f"steps are not 0 .. {len(steps) - 1}: {steps[-5:]}")
        expected: dict[int, tuple[int, bytes]] = {}
        for n in steps:
            for key, pad in self._changes(n).items():
                if pad is None:
                    expected.pop(key, None)
                else:
                    expected[key] = (n, pad)
        found = {k: (v, pad) for k, v, pad in connection.execute("SELECT k, v, pad FROM cells")}
        if found != expected:
            wrong = [k for k in range(self.cells) if found.get(k) != expected.get(k)]
            raise NotAPrefix(f"after {len(steps)} transactions these cells are wrong: {wrong}")
        return len(steps)

    def length_of(self, path: Path) -> int:
        """`length` of a complete database file, whose integrity is checked too."""
        findings = integrity_check(path, "full")
        if findings:
            raise NotAPrefix(f"{path} is damaged: {findings}")
        connection = apsw.Connection(
            f"file:{path}?immutable=1",
            flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI,
            vfs="unix",
        )
        try:
            return self.length(connection)
        finally:
            connection.close(True)
