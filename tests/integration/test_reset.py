"""`walship reset` and `walship status`, beside databases that are open and that are not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import walship
from support.databases import Database, Stores
from walship.cli import main


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path)


def _brought_back(database: Database) -> None:
    """The volume as it was before the last commits, all of which are in the replica."""
    saved = database.directory / "saved"
    state = database.directory / ".app.db-walship"
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
    shutil.copytree(state, saved / "state")
    shutil.copy2(database.path, saved / "app.db")
    with database.opened() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
    shutil.rmtree(state)
    (saved / "state").rename(state)
    (saved / "app.db").rename(database.path)


def test_an_older_volume_is_refused_and_can_be_reset(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brought back from a disk snapshot it may not go on, until somebody decides that it shall."""
    _brought_back(database)
    before = database.segments()
    assert main(["reset", "-dry-run", str(database.path)]) == 0
    assert "would be reset" in capsys.readouterr().err
    with pytest.raises(walship.ContinuityError) as caught:
        database.connect()
    assert caught.value.replica_txid == caught.value.local_txid + 1
    for way_out in ("walship restore", "new path", "adopt=True", "walship reset"):
        assert way_out in str(caught.value)
    assert database.segments() == before
    assert main(["status", str(database.path)]) == 6
    found = capsys.readouterr()
    assert " error " in found.out
    assert "walship restore" in found.err
    assert main(["reset", str(database.path)]) == 0
    assert "was reset" in capsys.readouterr().err
    with database.opened() as connection:
        connection.execute("INSERT INTO t VALUES (2)")
        database.sync()
    database.assert_replica_equals_file()
    assert set(before) < set(database.segments())


def test_a_reset_of_what_the_replica_holds_ships_nothing(database: Database) -> None:
    """Where database and replica are the same, they are compared, and history goes on."""
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        for _ in range(40):
            connection.execute("INSERT INTO t VALUES (randomblob(1000))")
    before = database.segments()
    assert main(["reset", str(database.path)]) == 0
    with database.opened() as connection:
        database.sync()
        assert database.segments() == before
        connection.execute("INSERT INTO t VALUES (1)")
    assert len(database.segments()) == len(before) + 1
    assert not database.full_copies()[1:]
    database.assert_replica_equals_file()


def test_a_database_that_is_open_is_not_reset(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is changed while a process has it open."""
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        assert main(["reset", str(database.path)]) == 1
        assert "close the database" in capsys.readouterr().err
        database.sync()
    database.assert_replica_equals_file()


def test_an_open_database_is_not_replaced(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """A restore, forced or not, leaves a database alone that is open; and works once it is not."""
    replica = str(database.replica)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        connection.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(walship.RefusedError, match="close the database in every process"):
            walship.restore(replica, database.path, overwrite=True)
        assert main(["restore", "-force", "-o", str(database.path), replica]) == 1
        assert "close the database in every process" in capsys.readouterr().err
        program = [sys.executable, "-m", "walship.cli", "restore", "-force", "-o"]
        elsewhere = subprocess.run(
            [*program, str(database.path), replica],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert elsewhere.returncode == 1
        assert "close the database in every process" in elsewhere.stderr
        assert connection.execute("SELECT x FROM t").get == 1
    database.assert_replica_equals_file()
    assert main(["restore", "-force", "-o", str(database.path), replica]) == 0


def test_reset_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong path is an error, and makes no state directory."""
    assert main(["reset", str(tmp_path / "none.db")]) == 1
    assert "there is no database" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _status(database: Database, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    main(["status", "-json", str(database.path)])
    (row,) = json.loads(capsys.readouterr().out)
    return dict(row)


def test_status_of_an_open_database(
    database: Database, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that uploads says how it stands, without a request; also what is wrong."""
    stores = Stores(monkeypatch)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        shipped = f"{database.sync():016x}"
        calls = stores.last.calls.copy()
        row = _status(database, capsys)
        assert (row["status"], row["state"], row["lag"]) == ("ok", "ok", "0.0 s")
        assert row["local_txid"] == row["replica_txid"] == shipped
        assert stores.last.calls == calls
        stores.fail(before=1.0, after=0.0)
        connection.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(walship.NotYetReplicated):
            walship.replication(connection).sync(0.3)
        row = _status(database, capsys)
        assert (row["status"], row["state"]) == ("error", "retrying")
        assert row["replica_txid"] == shipped
        stores.fail(before=0.0, after=0.0)
    row = _status(database, capsys)
    assert (row["status"], row["state"]) == ("ok", "not open")


@pytest.mark.parametrize("damage", ["missing", "spoilt"])
def test_a_reset_heals_a_damaged_replica(
    damage: str, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """The full copy becomes a snapshot, from which on everything can be restored and merged."""
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        for n in range(20):
            connection.execute("INSERT INTO t VALUES (?)", (n,))
            database.sync()
    victim = database.replica / "ltx" / "0" / f"{9:016x}-{9:016x}.ltx"
    if damage == "missing":
        victim.unlink()
    else:
        body = bytearray(victim.read_bytes())
        body[len(body) // 2] ^= 0x40
        victim.write_bytes(body)
    with pytest.raises(walship.ReplicaError):
        database.restore()
    assert main(["reset", str(database.path)]) == 0
    with database.opened() as connection:
        txid = database.sync()
        database.engine().tend(snapshot=False, timeout=30)
        database.assert_replica_equals_now()
        for n in range(20):
            connection.execute("INSERT INTO t VALUES (?)", (-n,))
            database.sync()
        database.engine().tend(snapshot=True, timeout=30)
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()
    snapshots = sorted((database.replica / "ltx" / "9").iterdir())
    assert snapshots[0].name == f"{1:016x}-{txid:016x}.ltx"
    assert len(snapshots) == 2
