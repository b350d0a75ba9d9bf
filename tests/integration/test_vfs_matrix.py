"""Whatever an application does through the VFS, the replica restores to the same bytes."""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

import walship
from support.databases import WAIT_S, Database, assert_same_bytes, dump
from walship.replica.check import integrity_check

PAGE_SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

Action = Callable[[walship.Connection], None]


def _fill(connection: walship.Connection, rows: int = 60, size: int = 900) -> None:
    connection.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, a INTEGER, b BLOB)")
    connection.execute("CREATE INDEX IF NOT EXISTS t_a ON t (a)")
    with connection:
        for n in range(rows):
            connection.execute(
                "INSERT INTO t (a, b) VALUES (?, randomblob(?))", (n % 7, size + n % 13)
            )


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("encoding", ["block", "frame"])
def test_page_sizes(page_size: int, encoding: str, tmp_path: Path) -> None:
    """Every page size from 512 to 65536 replicates, in both page encodings."""
    database = Database(tmp_path, page_size=page_size, page_encoding=encoding)
    with database.opened() as connection:
        assert connection.pragma("page_size") == page_size
        _fill(connection)
        database.assert_replica_equals_now()
        connection.execute("UPDATE t SET b = zeroblob(10) WHERE a = 3")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("DELETE FROM t WHERE a = 4")
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def _spill(connection: walship.Connection) -> None:
    connection.execute("PRAGMA cache_size = 5")
    with connection:
        _fill(connection, rows=300)
        connection.execute("UPDATE t SET b = randomblob(1200), a = a + 1")
        connection.execute("UPDATE t SET a = a + 1 WHERE id % 3 = 0")


def _spill_and_roll_back(connection: walship.Connection) -> None:
    _fill(connection)
    connection.execute("PRAGMA cache_size = 5")
    connection.execute("BEGIN")
    connection.execute("UPDATE t SET b = randomblob(3000)")
    connection.execute("ROLLBACK")
    connection.execute("INSERT INTO t (a) VALUES (77)")


def _savepoints(connection: walship.Connection) -> None:
    _fill(connection)
    connection.execute("PRAGMA cache_size = 5")
    connection.execute("SAVEPOINT one")
    connection.execute("UPDATE t SET b = randomblob(2000) WHERE id < 30")
    connection.execute("SAVEPOINT two")
    connection.execute("DELETE FROM t WHERE id > 20")
    connection.execute("ROLLBACK TO two")
    connection.execute("INSERT INTO t (a, b) VALUES (1, randomblob(9000))")
    connection.execute("RELEASE one")


def _vacuum(connection: walship.Connection) -> None:
    _fill(connection, rows=300)
    connection.execute("DELETE FROM t WHERE id % 2")
    connection.execute("VACUUM")
    connection.execute("INSERT INTO t (a) VALUES (1)")


def _shrink(connection: walship.Connection) -> None:
    _fill(connection, rows=400)
    connection.execute("DELETE FROM t WHERE id > 5")
    connection.execute("VACUUM")


def _shrink_and_grow(connection: walship.Connection) -> None:
    for _ in range(3):
        _shrink(connection)
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        _fill(connection, rows=200)


def _unwritten_pages(connection: walship.Connection) -> None:
    # Pages that a transaction takes and frees again are part of the file without having a frame.
    _shrink(connection)
    for size in (100_000, 300_000):
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (1000000, 1, randomblob(?))", (size,))
        connection.execute("DELETE FROM t WHERE id = 1000000")
        connection.execute("COMMIT")
        walship.replication(connection).sync(30)
        connection.execute("INSERT INTO t (a, b) VALUES (1, randomblob(5000))")


def _auto_vacuum(mode: str) -> Action:
    def act(connection: walship.Connection) -> None:
        connection.execute(f"PRAGMA auto_vacuum = {mode}")
        connection.execute("VACUUM")
        _fill(connection, rows=300)
        connection.execute("DELETE FROM t WHERE id > 40")
        connection.execute("PRAGMA incremental_vacuum(7)").fetchall()
        connection.execute("INSERT INTO t (a, b) VALUES (1, randomblob(3000))")
        connection.execute("PRAGMA incremental_vacuum").fetchall()

    return act


def _change_page_size(connection: walship.Connection) -> None:
    _fill(connection, rows=100)
    connection.execute("PRAGMA user_version = 5")
    connection.execute("PRAGMA application_id = 77")


def _temporary(connection: walship.Connection) -> None:
    _fill(connection)
    connection.execute("PRAGMA temp_store = FILE")
    connection.execute("DROP TABLE IF EXISTS temp.s")
    connection.execute("CREATE TEMP TABLE s AS SELECT * FROM t")
    connection.execute("UPDATE s SET b = randomblob(2000)")
    connection.execute("INSERT INTO t (a, b) SELECT a, b FROM s ORDER BY random()")


def _backup_into(connection: walship.Connection) -> None:
    _fill(connection)
    source = apsw.Connection(":memory:")
    source.pragma("page_size", connection.pragma("page_size"))
    source.execute("CREATE TABLE other (x, y)")
    source.execute("INSERT INTO other VALUES (1, randomblob(100000))")
    with connection.backup("main", source, "main") as backup:
        while not backup.done:
            backup.step(5)
    source.close()


def _autocheckpoints(connection: walship.Connection) -> None:
    connection.wal_autocheckpoint(3)
    for _ in range(5):
        _fill(connection, rows=40)


def _journal_size_limit(connection: walship.Connection) -> None:
    connection.execute("PRAGMA journal_size_limit = 2000")
    _autocheckpoints(connection)


def _secure_delete(connection: walship.Connection) -> None:
    connection.execute("PRAGMA secure_delete = ON")
    _fill(connection, rows=200)
    connection.execute("DELETE FROM t")
    connection.execute("DROP TABLE t")


def _synchronous(level: str) -> Action:
    def act(connection: walship.Connection) -> None:
        connection.execute(f"PRAGMA synchronous = {level}")
        connection.wal_autocheckpoint(10)
        _fill(connection, rows=100)
        for n in range(20):
            connection.execute("UPDATE t SET a = ? WHERE id = ?", (n, n))

    return act


def _mapped(connection: walship.Connection) -> None:
    connection.execute("PRAGMA mmap_size = 10000000")
    _shrink_and_grow(connection)


def _returning(connection: walship.Connection) -> None:
    _fill(connection)
    next(iter(connection.execute("INSERT INTO t (a) VALUES (5), (6) RETURNING id")))
    next(iter(connection.execute("DELETE FROM t WHERE a = 5 RETURNING id")))


ACTIONS: dict[str, Action] = {
    "cache spill": _spill,
    "spill, then rollback": _spill_and_roll_back,
    "savepoints": _savepoints,
    "vacuum": _vacuum,
    "shrink": _shrink,
    "shrink and grow": _shrink_and_grow,
    "pages without a frame": _unwritten_pages,
    "auto_vacuum full": _auto_vacuum("FULL"),
    "auto_vacuum incremental": _auto_vacuum("INCREMENTAL"),
    "header pragmas": _change_page_size,
    "temporary tables": _temporary,
    "backup into the database": _backup_into,
    "autocheckpoints": _autocheckpoints,
    "journal_size_limit": _journal_size_limit,
    "secure_delete": _secure_delete,
    "synchronous off": _synchronous("OFF"),
    "synchronous full": _synchronous("FULL"),
    "synchronous extra": _synchronous("EXTRA"),
    "memory mapped": _mapped,
    "returning": _returning,
}


@pytest.mark.parametrize("name", sorted(ACTIONS))
def test_actions(name: str, tmp_path: Path) -> None:
    """After each action, alone and repeated after reopening, replica and database are equal."""
    database = Database(tmp_path, page_size=1024)
    for _ in range(2):
        with database.opened() as connection:
            ACTIONS[name](connection)
            database.assert_replica_equals_now()
            ACTIONS[name](connection)
        database.assert_replica_equals_file()


@pytest.mark.parametrize("mode", ["NOOP", "PASSIVE", "FULL", "RESTART", "TRUNCATE"])
@pytest.mark.parametrize("synced", [False, True], ids=["unsynced", "synced"])
def test_checkpoints_at_any_moment(mode: str, synced: bool, tmp_path: Path) -> None:
    """Checkpoints of every kind between commits, shipped or not, lose nothing."""
    database = Database(tmp_path, page_size=512, sync_interval=0.0 if synced else 3600.0)
    with database.opened() as connection, database.opened() as other:
        _fill(connection, rows=20)
        for n in range(25):
            connection.execute("UPDATE t SET b = randomblob(?) WHERE id % 5 = ?", (n * 40, n % 5))
            if synced and n % 3 == 0:
                database.sync()
            writer = (connection, other)[n % 2]
            writer.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
            if n % 8 == 7:
                database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_a_reader_holds_the_checkpoint(tmp_path: Path) -> None:
    """While a reader keeps an old state, checkpoints are partial; nothing is lost or repeated."""
    database = Database(tmp_path, page_size=512)
    with database.opened() as writer, database.opened() as reader:
        _fill(writer, rows=30)
        database.sync()  # the first copy keeps writers out for a moment
        writer.set_busy_timeout(0)
        for n in range(12):
            reader.execute("BEGIN")
            count = reader.execute("SELECT count(*) FROM t").get
            writer.execute("INSERT INTO t (a, b) VALUES (?, randomblob(3000))", (n,))
            for mode in (apsw.SQLITE_CHECKPOINT_PASSIVE, apsw.SQLITE_CHECKPOINT_TRUNCATE):
                try:
                    writer.wal_checkpoint(mode=mode)
                except apsw.BusyError:
                    continue
            writer.execute("DELETE FROM t WHERE id = ?", (n,))
            assert reader.execute("SELECT count(*) FROM t").get == count
            reader.execute("COMMIT")
            if n % 4 == 3:
                database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_attach_replicates_both(tmp_path: Path) -> None:
    """One transaction over two attached replicated databases arrives in both replicas."""
    one, two = Database(tmp_path, "one.db"), Database(tmp_path, "two.db")
    with two.opened():
        pass
    with one.opened() as connection:
        connection.execute("ATTACH ? AS two", (str(two.path),))
        assert connection.execute("PRAGMA two.journal_mode").get == "wal"
        connection.execute("CREATE TABLE main.t (x)")
        connection.execute("CREATE TABLE two.t (x)")
        for n in range(20):
            with connection:
                connection.execute("INSERT INTO main.t VALUES (?)", (n,))
                connection.execute("INSERT INTO two.t VALUES (?)", (-n,))
            if n == 10:
                one.assert_replica_equals_now()
                two.assert_replica_equals_now()
                connection.execute("PRAGMA two.wal_checkpoint(TRUNCATE)").fetchall()
    for database in (one, two):
        database.assert_replica_equals_file()
    assert len(dump(two.restore())) == 21


def test_detach_drains(tmp_path: Path) -> None:
    """DETACH closes the attached database as a last close does: everything is in the replica."""
    one, two = Database(tmp_path, "one.db"), Database(tmp_path, "two.db")
    with two.opened():
        pass
    with one.opened() as connection:
        connection.execute("ATTACH ? AS two", (str(two.path),))
        connection.execute("CREATE TABLE two.t AS SELECT randomblob(10000) AS x")
        connection.execute("DETACH two")
        two.assert_replica_equals_file()


def test_attach_of_an_unconfigured_file_passes_through(tmp_path: Path) -> None:
    """A database nobody configured is attached as an ordinary one, in its own journal mode."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("ATTACH ? AS plain", (str(tmp_path / "plain.db"),))
        connection.execute("CREATE TABLE plain.t (x)")
        connection.execute("INSERT INTO plain.t VALUES (1)")
        connection.execute("CREATE TABLE t (x)")
        assert connection.execute("PRAGMA plain.journal_mode").get == "delete"
    database.assert_replica_equals_file()
    assert integrity_check(tmp_path / "plain.db", "full") == []
    assert not (tmp_path / ".plain.db-walship").exists()


def test_memory_databases_pass_through(tmp_path: Path) -> None:
    """In-memory and nameless temporary databases work through the VFS and leave nothing behind."""
    database = Database(tmp_path)
    with database.opened() as connection:
        for name in (":memory:", ""):
            connection.execute("ATTACH ? AS m", (name,))
            connection.execute("CREATE TABLE m.t (x)")
            connection.execute("INSERT INTO m.t VALUES (randomblob(3000000))")
            connection.execute("DETACH m")
    memory = apsw.Connection(":memory:", vfs="walship")
    memory.execute("CREATE TABLE t (x)")
    memory.close()
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names <= {"app.db", "app.db-replica", ".app.db-walship"}


def test_many_connections_and_threads(tmp_path: Path) -> None:
    """Connections in several threads write, checkpoint, open and close at the same time."""
    database = Database(tmp_path, page_size=1024, busy_timeout=20)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (thread, n, b)")
        failures: list[BaseException] = []

        def work(number: int) -> None:
            rng = random.Random(number)
            try:
                mine = database.connect()
                mine.wal_autocheckpoint(rng.choice((5, 50, 1000)))
                for n in range(40):
                    mine.execute("INSERT INTO t VALUES (?, ?, randomblob(700))", (number, n))
                    if rng.random() < 0.1:
                        mine.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                    if rng.random() < 0.05:
                        mine.close(True)
                        mine = database.connect()
                mine.close(True)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert connection.execute("SELECT count(*) FROM t").get == 200
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_one_connection_in_many_threads(tmp_path: Path) -> None:
    """One connection used by several threads in turn replicates like one used by a single one."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")

        def work(n: int) -> None:
            connection.execute("INSERT INTO t VALUES (?)", (n,))
            if n % 4 == 0:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

        for n in range(16):
            thread = threading.Thread(target=work, args=(n,))
            thread.start()
            thread.join()
    database.assert_replica_equals_file()
    assert len(dump(database.restore())) == 17


def test_close_and_reopen_in_turn(tmp_path: Path) -> None:
    """Fast last closes and reopens, from several threads, neither lose nor fork anything."""
    database = Database(tmp_path, busy_timeout=20)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for n in range(8):
                with database.opened() as mine:
                    mine.execute("INSERT INTO t VALUES (?)", (number * 100 + n,))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    database.assert_replica_equals_file()
    assert len(dump(database.path)) == 25
    assert len(database.full_copies()) <= 1


def test_close_at_once_leaves_no_wal(tmp_path: Path) -> None:
    """The last close leaves the main file alone, even if the first copy was still to be made."""
    for n in range(20):
        database = Database(tmp_path, f"{n}.db")
        with database.opened() as connection:
            connection.execute("CREATE TABLE t (x)")
        names = {entry.name for entry in tmp_path.iterdir()}
        assert not names & {f"{n}.db-wal", f"{n}.db-shm"}
        database.assert_replica_equals_file()


def test_backup_out_of_the_database(tmp_path: Path) -> None:
    """The backup API and VACUUM INTO read a replicated database; the copy is whole and ordinary."""
    database = Database(tmp_path)
    with database.opened() as connection:
        _fill(connection)
        target = apsw.Connection(str(tmp_path / "copy.db"))
        with target.backup("main", connection, "main") as backup:
            backup.step()
        target.close()
        connection.execute("VACUUM INTO ?", (str(tmp_path / "into.db"),))
        expected = dump(database.path)
        assert dump(tmp_path / "copy.db") == expected
        assert dump(tmp_path / "into.db") == expected
    database.assert_replica_equals_file()


@pytest.mark.parametrize("mode", ["delete", "DELETE", "truncate", "persist", "memory", "off"])
def test_other_journal_modes_are_refused(mode: str, tmp_path: Path) -> None:
    """Leaving WAL mode is refused with a reason, and the database goes on as before."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        for statement in (f"PRAGMA journal_mode = {mode}", f"pragma Journal_Mode({mode})"):
            with pytest.raises(walship.RefusedError, match="only the WAL"):
                connection.execute(statement)
        assert connection.pragma("journal_mode") == "wal"
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("INSERT INTO t VALUES (1)")
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_exclusive_locking_mode_is_refused_or_replicates(tmp_path: Path) -> None:
    """Exclusive locking mode, in which nothing can be read beside the writer, never loses data."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        with pytest.raises(walship.RefusedError, match="locking_mode"):
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("INSERT INTO t VALUES (1)")
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_plain_apsw_connections_replicate_too(tmp_path: Path) -> None:
    """``apsw.Connection(path, vfs="walship")`` replicates a configured database."""
    database = Database(tmp_path)
    replica = {"path": str(database.replica), "sync_interval": 0.0}
    walship.configure(database.path, replica)
    connection = apsw.Connection(str(database.path), vfs="walship")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (x)")
    database.assert_replica_equals_now()
    connection.close()
    database.assert_replica_equals_file()


def test_a_uri_names_the_replica(tmp_path: Path) -> None:
    """``?replica=`` in a URI filename configures the replica."""
    walship.configure(tmp_path / "unrelated.db", str(tmp_path / "unrelated"))
    database = Database(tmp_path)
    connection = apsw.Connection(
        f"file:{database.path}?replica={database.replica}",
        vfs="walship",
        flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI,
    )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    database.assert_replica_equals_file()


def test_an_existing_database_is_copied_first(tmp_path: Path) -> None:
    """A database made by plain SQLite in rollback mode is taken over with one full copy."""
    database = Database(tmp_path)
    plain = apsw.Connection(str(database.path), vfs="unix")
    plain.execute("CREATE TABLE t (x)")
    with plain:
        plain.executemany("INSERT INTO t VALUES (?)", ((n,) for n in range(5000)))
    plain.close()
    before = database.path.read_bytes()
    with database.opened():
        database.sync()
        copy = database.restore()
        assert_same_bytes(_without_mode(copy), _without_mode(tmp_path / "x", before))
    database.assert_replica_equals_file()
    assert len(database.full_copies()) == 1


def _without_mode(path: Path, content: bytes | None = None) -> Path:
    """The file without what changing the journal mode changes in page 1."""
    data = bytearray(path.read_bytes() if content is None else content)
    data[18:20], data[24:28], data[92:100] = b"\0\0", b"\0" * 4, b"\0" * 8
    path.write_bytes(data)
    return path


def test_the_last_connection_is_for_reading_only(tmp_path: Path) -> None:
    """It is closed without an error; the WAL stays for whoever may write, as with plain SQLite."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        reader = database.connect(flags=apsw.SQLITE_OPEN_READONLY)
        assert reader.execute("SELECT count(*) FROM t").get == 0
    reader.close()
    with database.opened() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_a_hard_link_to_an_open_database(tmp_path: Path) -> None:
    """Under a second name it would get a second log, and be ruined."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        (tmp_path / "other.db").hardlink_to(database.path)
        with pytest.raises(walship.RefusedError, match="hard link"):
            Database(tmp_path, "other.db").connect()
        connection.execute("INSERT INTO t VALUES (1)")
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_a_log_that_is_taken_away(tmp_path: Path) -> None:
    """Nothing counts as shipped that only an unnamed file holds; it says that it cannot be read."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        Path(f"{database.path}-wal").unlink()
        connection.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(walship.NotYetReplicated, match="cannot be read"):
            while True:
                walship.replication(connection).sync(0.5)
    with database.opened() as connection:
        database.sync()
    database.assert_replica_equals_file()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_taken_away(replaced: bool, tmp_path: Path) -> None:
    """Nothing that is written to a file without a name counts as shipped, and soon none is."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        if replaced:
            # By another process: closing it in this one would drop SQLite's locks on it.
            subprocess.run(["cp", database.path, tmp_path / "new.db"], check=True)
            (tmp_path / "new.db").replace(database.path)
        else:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{database.path}{suffix}").unlink()
        with pytest.raises(walship.RefusedError, match="deleted, renamed or replaced"):
            connection.execute("INSERT INTO t VALUES (1)")  # perhaps noticed here already
            while True:
                walship.replication(connection).sync(WAIT_S)
                assert replaced, "a commit to a deleted file was acknowledged"
        with pytest.raises(walship.RefusedError, match="deleted, renamed or replaced"):
            connection.execute("INSERT INTO t VALUES (2)")
