"""The store goes away and comes back: what the application, the log and the replica see of it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import walship
from support.databases import WAIT_S, Database, Stores, dump
from support.servers import S3Endpoint
from walship.replica.errors import StoreError, StoreUnavailable


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Stores:
    for name in ("BACKOFF_FIRST_S", "BACKOFF_REFUSED_S"):
        monkeypatch.setattr(f"walship.replica.uploader.{name}", 0.002)
    monkeypatch.setattr("walship.replica.uploader.BACKOFF_LONGEST_S", 0.01)
    return Stores(monkeypatch)


@pytest.fixture
def connection(tmp_path: Path, stores: Stores) -> Iterator[walship.Connection]:
    database = Database(tmp_path, page_size=1024)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, b)")
        database.sync()
        yield connection
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("walship")
    ]


def _wait_for(condition: object, caplog: pytest.LogCaptureFixture, count: int) -> None:
    """Until the log has so many lines; nothing is measured with it."""
    deadline = time.monotonic() + WAIT_S
    while len(_lines(caplog)) < count:
        assert time.monotonic() < deadline, f"{condition}: {_lines(caplog)}"
        time.sleep(0.005)


def _fail_with(stores: Stores, error: StoreError) -> None:
    stores.last._error = lambda operation: error
    stores.fail(before=1.0, after=0.0)


def test_one_line_when_it_goes_and_one_when_it_is_back(
    connection: walship.Connection, stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    """An outage of hundreds of attempts is two lines, and nothing that a commit would notice."""
    puts = stores.last.calls["put"]
    shipped = walship.replication(connection).sync(WAIT_S)
    stores.fail(before=1.0, after=0.0)
    n = 0
    while stores.last.calls["put"] < puts + 60:
        connection.execute("INSERT INTO t (b) VALUES (randomblob(400))")
        n += 1
        if n % 40 == 0:
            connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        time.sleep(0.001)
    status = walship.replication(connection).status()
    assert status.state == "retrying"
    assert "on purpose" in (status.last_error or "")
    assert status.lag_s > 0
    assert status.replicated_txid == shipped
    before = stores.last.calls["put"]
    stores.fail(before=0.0, after=0.0)
    txid = walship.replication(connection).sync(WAIT_S)
    assert txid - status.replicated_txid <= 3, "few objects, whatever there was to send"
    assert stores.last.calls["put"] - before <= 8
    gone, back = _lines(caplog)
    assert "cannot replicate: " in gone
    assert gone.endswith("(trying again)")
    assert "replicating again after " in back
    assert back.endswith("of changes were waiting")
    assert walship.replication(connection).status().ok


def test_a_line_for_each_change_in_between(
    connection: walship.Connection, stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    """Other trouble is another line, with what to do; the same again is none."""
    _fail_with(stores, StoreUnavailable("no answer", code="ReadTimeoutError"))
    connection.execute("INSERT INTO t (b) VALUES (1)")
    _wait_for("gone", caplog, 1)
    _fail_with(stores, StoreError("keys are wrong", code="AccessDenied"))
    _wait_for("changed", caplog, 2)
    _fail_with(stores, StoreError("keys are wrong, still", code="AccessDenied"))
    calls = stores.last.calls["put"]
    while stores.last.calls["put"] < calls + 20:
        time.sleep(0.002)
    stores.fail(before=0.0, after=0.0)
    walship.replication(connection).sync(WAIT_S)
    _wait_for("back", caplog, 3)
    lines = _lines(caplog)
    assert [("no answer" in lines[0]), ("keys are wrong" in lines[1])] == [True, True]
    assert "replicating again" in lines[2]
    assert len(lines) == 3


def test_a_hiccup_is_not_worth_a_line(
    connection: walship.Connection, stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    """What the second attempt mends is only counted."""
    stores.last._script = iter(["before", "after"])
    connection.execute("INSERT INTO t (b) VALUES (1)")
    walship.replication(connection).sync(WAIT_S)
    assert stores.last.faults["before"] == stores.last.faults["after"] == 1
    assert _lines(caplog) == []


@pytest.mark.parametrize("noticed_by", ["the next upload", "the lease"])
def test_a_bucket_that_was_deleted_and_made_again(
    noticed_by: str,
    minio_server: S3Endpoint,
    tmp_path: Path,
    stores: Stores,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is acknowledged afterwards is restored: all that the bucket had is shipped anew."""
    bucket = minio_server.make_bucket()
    replica = minio_server.replica(bucket, "app")
    with contextlib.closing(walship.connect(tmp_path / "app.db", replica)) as connection:
        connection.execute("CREATE TABLE t (x)")
        replication = walship.replication(connection)
        replication.sync(WAIT_S)
        _delete_bucket(minio_server, bucket)
        if noticed_by == "the next upload":
            connection.execute("INSERT INTO t VALUES (1)")
            with pytest.raises(walship.NotYetReplicated, match="does not exist: create it"):
                while True:
                    replication.sync(0.2)
            minio_server.make_bucket(bucket)
        else:
            minio_server.make_bucket(bucket)
            connection.execute("INSERT INTO t VALUES (1)")
            replication.engine.fence._proof = float("-inf")  # as after a long pause
        replication.sync(WAIT_S)
        assert replication.status().state == "ok"
        walship.restore(replica, tmp_path / "restored.db", integrity_check="full")
    assert dump(tmp_path / "restored.db") == dump(tmp_path / "app.db")
    assert any("has lost txid" in line for line in _lines(caplog))


def _delete_bucket(server: S3Endpoint, bucket: str) -> None:
    with contextlib.closing(server.client()) as client:
        for key in server.keys(bucket):
            client.delete_object(Bucket=bucket, Key=key)
        client.delete_bucket(Bucket=bucket)
