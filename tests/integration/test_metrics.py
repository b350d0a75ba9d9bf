"""Numbers: of a database that is shipped, cannot be, and is idle; and those for Prometheus."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import walship
from support.databases import WAIT_S, Database, Stores
from support.workers import Workers, workers
from walship.replica.capture import Capture
from walship.replica.sealing import Sealer
from walship.replica.sqlite import SpoolError
from walship.vfs.registry import registry


@pytest.fixture
def fleet() -> Iterator[Workers]:
    with workers() as made:
        yield made


def wait(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def fetch(address: str) -> dict[str, float]:
    """What is served, by ``name{label=value,...}``; labels in the order of their names."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def _puts(found: walship.Metrics) -> int:
    """Attempts to put into directories; this process may know other stores."""
    return sum(
        each.attempts
        for each in found.operations
        if (each.replica_type, each.operation) == ("file", "PUT")
    )


def test_what_an_application_sees(tmp_path: Path) -> None:
    """Without any other library: how each database stands, and what was done."""
    assert walship.metrics().databases == ()
    first, second = Database(tmp_path, "a.db"), Database(tmp_path, "b.db", validation_interval=99)
    before = _puts(walship.metrics())
    with first.opened() as db, second.opened():
        db.execute("create table t(x)")
        first.sync()
        second.sync()
        (start, _) = walship.metrics().databases
        for n in range(3):
            db.execute("insert into t values(?)", (n,))
            first.sync()
        db.wal_checkpoint()
        found = walship.metrics()
        mine, other = found.databases
        assert mine.status == walship.replication(db).status()
        assert (mine.status.lag_s, mine.status.pending_bytes, mine.status.uploader) == (0, 0, True)
        assert mine.status.replicated_txid == mine.status.txid == start.status.txid + 3
        assert mine.database_bytes == first.path.stat().st_size
        assert mine.work.uploads == mine.status.txid
        assert mine.work.upload_bytes == sum(first.segments().values())
        grown = mine.status.wal_bytes - start.status.wal_bytes
        assert mine.work.wal_bytes - start.work.wal_bytes == grown > 0
        assert mine.work.syncs >= mine.work.uploads
        assert mine.work.sync_s > 0
        assert mine.work.sync_errors == 0
        assert (other.status.path, other.validation_interval_s) == (str(second.path), 99)
        assert other.work.uploads == other.status.txid
        assert _puts(found) - before >= mine.work.uploads
    assert walship.metrics().databases == ()


def test_checkpoints_by_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to the WAL is counted by what it is, and what is refused too."""
    database = Database(tmp_path, spool_full="fail")

    def counted() -> dict[str, tuple[int, int]]:
        (found,) = walship.metrics().databases
        assert all(each.seconds > 0 for each in found.work.checkpoints if each.attempts)
        return {each.mode: (each.attempts, each.errors) for each in found.work.checkpoints}

    with database.opened() as db:
        db.execute("create table t(x)")
        database.sync()  # a copy that is being made is in the way
        assert counted() == {"PASSIVE": (0, 0), "RESTART": (0, 0), "TRUNCATE": (0, 0)}
        db.wal_checkpoint()
        assert counted() == {"PASSIVE": (1, 0), "RESTART": (0, 0), "TRUNCATE": (0, 0)}
        db.execute("insert into t values(1)")
        assert counted() == {"PASSIVE": (1, 0), "RESTART": (1, 0), "TRUNCATE": (0, 0)}
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        db.execute("insert into t values(2)")  # into an empty file: nothing was begun anew
        assert counted() == {"PASSIVE": (2, 0), "RESTART": (1, 0), "TRUNCATE": (1, 0)}
        db.wal_checkpoint()
        database.sync()

        def refuse(self: Capture, *args: Any) -> None:
            raise SpoolError("no room")

        monkeypatch.setattr(Capture, "gate_restart", refuse)
        with pytest.raises(apsw.IOError):
            db.execute("insert into t values(3)")
        assert counted() == {"PASSIVE": (3, 0), "RESTART": (2, 1), "TRUNCATE": (1, 0)}
        monkeypatch.undo()
        db.execute("insert into t values(3)")


def test_lag_while_the_store_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lag and pending bytes grow while nothing can be sent; at rest they are 0, always."""
    stores = Stores(monkeypatch)
    database = Database(tmp_path)
    with database.opened() as db:
        db.execute("create table t(x)")
        database.sync()
        stores.block()
        time.sleep(0.1)
        (idle,) = walship.metrics().databases
        assert (idle.status.lag_s, idle.status.pending_bytes) == (0, 0)
        db.execute("insert into t values(1)")
        wait(lambda: walship.metrics().databases[0].status.pending_bytes)
        early = walship.metrics().databases[0].status.lag_s
        wait(lambda: walship.metrics().databases[0].status.lag_s > early > 0)
        stores.release()
        database.sync()
        (again,) = walship.metrics().databases
        assert (again.status.lag_s, again.status.pending_bytes) == (0, 0)


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without room is seen, and that it has room again."""
    database = Database(tmp_path)
    freeze = Sealer.freeze
    full = False

    def refuse(self: Sealer, *args: Any) -> Any:
        if full:
            cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise SpoolError("cannot write the spool") from cause
        return freeze(self, *args)

    monkeypatch.setattr(Sealer, "freeze", refuse)
    with database.opened() as db:
        db.execute("create table t(x)")
        database.sync()
        assert not walship.metrics().databases[0].status.disk_full
        full = True
        db.execute("insert into t values(1)")
        wait(lambda: walship.metrics().databases[0].status.disk_full)
        assert walship.metrics().databases[0].work.sync_errors > 0
        full = False
        database.engine().uploader.retry_now()
        database.sync()
        assert not walship.metrics().databases[0].status.disk_full


def test_served_for_prometheus(tmp_path: Path) -> None:
    """Names and labels are Litestream's where there are any; values are those of `metrics`."""
    database = Database(tmp_path, validation_interval=3600)
    path = f"db={database.path}"
    with database.opened() as db, walship.serve_metrics("127.0.0.1:0") as server:
        db.execute("create table t(x)")
        database.sync()
        db.execute("insert into t values(1)")
        database.sync()
        assert walship.replication(db).verify(WAIT_S).ok
        (known,) = walship.metrics().databases
        found = fetch(server.address)
        expected: dict[str, float | None] = {
            "litestream_db_size": known.database_bytes,
            "litestream_wal_size": known.status.wal_bytes,
            "litestream_total_wal_bytes": known.work.wal_bytes,
            "litestream_txid": known.status.txid,
            "litestream_sync_error_count": 0,
            "litestream_disk_full": 0,
            "walship_replicated_txid": known.status.txid,
            "walship_replication_lag_seconds": 0,
            "walship_pending_bytes": 0,
            "walship_uploads_total": known.status.txid,
            "walship_upload_bytes_total": sum(database.segments().values()),
            "walship_uploader": 1,
            "walship_validation_interval_seconds": 3600,
            "walship_last_verified_txid": known.status.txid,
        }
        assert {name: found.get(f"{name}{{{path}}}") for name in expected} == expected
        assert found[f"litestream_sync_count{{{path}}}"] >= 2
        assert found[f"litestream_sync_seconds{{{path}}}"] > 0
        assert abs(found[f"walship_last_upload_timestamp_seconds{{{path}}}"] - time.time()) < 600
        assert abs(found[f"walship_last_verified_timestamp_seconds{{{path}}}"] - time.time()) < 600
        assert found[f"walship_state{{{path},state=ok}}"] == 1
        assert found[f"walship_state{{{path},state=stopped}}"] == 0
        assert found[f"walship_fence_state{{{path},state=held}}"] == 1
        assert found[f"walship_last_verification{{{path},outcome=sound}}"] == 1
        assert found[f"walship_replica_info{{{path},replica=file://{database.replica}}}"] == 1
        name, labels = "litestream_replica_operation", "operation=PUT,replica_type=file"
        puts = found[f"{name}_total{{{labels}}}"]
        assert puts >= 2
        assert found[f"{name}_bytes{{{labels}}}"] > 0
        assert found[f"{name}_duration_seconds_count{{{labels}}}"] == puts
        assert found[f"{name}_duration_seconds_bucket{{le=+Inf,{labels}}}"] == puts
        assert any(each.startswith("process_resident_memory_bytes") for each in found)


def test_what_is_not_known_has_no_sample(tmp_path: Path) -> None:
    """A time that never was is absent, not 0: age since 1970 would be an alarm."""
    database = Database(tmp_path)
    with database.opened(), walship.serve_metrics("127.0.0.1:0") as server:
        found = fetch(server.address)
        assert not [name for name in found if "timestamp" in name or "verified_txid" in name]


def test_level_0(tmp_path: Path) -> None:
    """Once it was looked for what to merge, segments of level 0 are counted by what keeps them."""
    database = Database(tmp_path, levels=["1s"])
    key = f"litestream_l0_retention_files_total{{db={database.path},status="
    with database.opened() as db, walship.serve_metrics("127.0.0.1:0") as server:
        for n in range(30):
            db.execute(f"create table t{n}(x)")
            database.sync()
        wait(lambda: fetch(server.address).get(f"{key}too_recent}}"))
        (found,) = walship.metrics().databases
        assert found.l0_files is not None
        assert found.l0_files.eligible == 0
        seen = found.l0_files.not_compacted + found.l0_files.too_recent
        assert 0 < seen <= found.status.txid  # more may have come since
        assert found.work.damaged_merges == 0


def test_failed_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stores refuse is counted by its code."""
    stores = Stores(monkeypatch)
    database = Database(tmp_path)
    key = "{code=StoreUnavailable,operation=PUT,replica_type=file}"
    with database.opened() as db, walship.serve_metrics("127.0.0.1:0") as server:
        db.execute("create table t(x)")
        database.sync()
        name = f"litestream_replica_operation_errors_total{key}"
        before = fetch(server.address).get(name, 0)
        stores.last.before = 1.0
        db.execute("insert into t values(1)")
        wait(lambda: fetch(server.address).get(name, 0) > before)
        stores.last.before = 0.0


def test_nobody_waits_for_a_database_that_is_being_opened(tmp_path: Path) -> None:
    """A restore may take minutes; the numbers of the others are there meanwhile."""
    database = Database(tmp_path)
    with database.opened(), walship.serve_metrics("127.0.0.1:0") as server, registry._lock:
        # Asked for by another thread, which an opening holds up where it may.
        assert f"litestream_db_size{{db={database.path}}}" in fetch(server.address)


def test_registered_once(tmp_path: Path) -> None:
    """An application's own registry gives our numbers out beside its own; twice is once."""
    own = CollectorRegistry()
    walship.register_metrics(own)
    walship.register_metrics(own)
    database = Database(tmp_path)
    with database.opened():
        database.sync()
        names = [family.name for family in own.collect()]
        assert names.count("walship_replication_lag_seconds") == 1
        labels = {"db": str(database.path)}
        assert own.get_sample_value("walship_replication_lag_seconds", labels) == 0


def test_an_address_that_is_taken() -> None:
    """Who has the address is not known; that it is taken is said in one line, with what to do."""
    with walship.serve_metrics("127.0.0.1:0") as server:
        with pytest.raises(walship.ConfigError, match="addr: metrics cannot be served on 127"):
            walship.serve_metrics(server.address)
        address = server.address
    with walship.serve_metrics(address) as server:  # which `close` gave back
        assert server.address == address
        server.close()
        server.close()


@pytest.mark.parametrize("address", ["9090", "127.0.0.1:70000", "http://127.0.0.1:80", ""])
def test_what_is_no_address(address: str) -> None:
    """An address that cannot be one is an error that shows what one is."""
    with pytest.raises(walship.ConfigError, match="addr: "):
        walship.serve_metrics(address)


def test_all_addresses() -> None:
    """Without a host metrics are served on all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with walship.serve_metrics(f":{port}"):
        assert fetch(f"127.0.0.1:{port}")


def test_ipv6() -> None:
    """An IPv6 address stands in brackets, as in a URL."""
    with socket.socket(socket.AF_INET6) as free:
        try:
            free.bind(("::1", 0))
        except OSError:
            pytest.skip("there is no IPv6 here")
    with walship.serve_metrics("[::1]:0") as server:
        assert server.address.startswith("[::1]:")
        assert fetch(server.address)


def test_without_prometheus_client() -> None:
    """Numbers are there without it; what needs it says how to get it."""
    script = """
import sys
sys.modules["prometheus_client"] = None
import walship
assert walship.metrics().databases == ()
for call in (lambda: walship.serve_metrics("127.0.0.1:0"), walship.register_metrics):
    try:
        call()
    except walship.ConfigError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pip install 'walship[metrics]'") == 2


def test_several_processes(tmp_path: Path, fleet: Workers) -> None:
    """Gauges are the same in each process; uploads are those of the one that made them."""
    database = Database(tmp_path)
    uploader = fleet(database.path, database.replica, sync_interval=0)
    other = fleet(database.path, database.replica, sync_interval=0)
    other.run("insert()")
    other.run("walship.replication(db).sync(60)")
    read = """
found = walship.metrics().databases[0]
[found.status.uploader, found.status.txid, found.status.replicated_txid, found.status.fence,
 found.work.uploads > 0]
"""
    first, second = uploader.run(read), other.run(read)
    assert (first[0], second[0]) == (True, False)
    assert first[1:4] == second[1:4]
    assert (first[4], second[4]) == (True, False)


def test_a_forked_child_counts_anew(tmp_path: Path, fleet: Workers) -> None:
    """A child has no open database, and none of its parent's requests."""
    database = Database(tmp_path)
    worker = fleet(database.path, database.replica)
    worker.run("insert()")
    worker.run("walship.replication(db).sync(60)")
    assert worker.run("len(walship.metrics().operations)") > 0
    fork = """
import os
pid = os.fork()
if not pid:
    found = walship.metrics()
    os._exit(0 if not found.databases and not found.operations else 1)
os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
    assert worker.run(fork) == 0
