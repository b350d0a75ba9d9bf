"""One writer per replica, with real processes that take themselves for different hosts."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import walship
from support.databases import WAIT_S, Database, Stores
from support.litestream import Litestream, Place, in_bucket, in_directory
from support.recording import Answer, RecordingEndpoint, Request, error_answer, recording_endpoint
from support.servers import S3Endpoint
from support.workers import Row, Worker, WorkerError, Workers, rows_of, workers
from walship.replica.clock import SystemClock
from walship.replica.fence import LEASE_KEY, Lease, parse_lease
from walship.replica.restore import restore

#: The shortest lease there is, seconds; a crashed owner keeps others out for this and two more.
LEASE_S = 2.0
#: How long hosts fight, seconds.
FIGHT_S = 60.0 if os.environ.get("WALSHIP_DEEP") else 8.0


@pytest.fixture
def fleet() -> Iterator[Workers]:
    with workers() as made:
        yield made


@pytest.fixture(params=["directory", "minio", "seaweedfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty replica: a directory, and a path in a bucket of each S3 server."""
    if request.param == "directory":
        return in_directory(tmp_path / "replica")
    server: S3Endpoint = request.getfixturevalue(f"{request.param}_server")
    return in_bucket(server)


class Hosts:
    """Machines, each with a disk of its own, whose databases share one replica."""

    def __init__(self, fleet: Workers, directory: Path, place: Place) -> None:
        self.fleet = fleet
        self.directory = directory
        self.place = place
        self._restored = itertools.count()

    def path(self, name: str) -> Path:
        disk = self.directory / name
        disk.mkdir(exist_ok=True)
        return disk / "app.db"

    def start(self, name: str, *, opened: bool = True, **settings: Any) -> Worker:
        """A process on a machine."""
        given = {"fence_lease": LEASE_S, "durability": "replica", **settings}
        path = self.path(name)
        return self.fleet(path, self.place.ours, host=name, opened=opened, **given)

    def restore(self) -> Path:
        output = self.directory / f"restored-{next(self._restored)}.db"
        with contextlib.closing(self.place.store()) as store:
            restore(store, output, clock=SystemClock(), integrity_check="full")
        return output

    def lease(self) -> Lease:
        with contextlib.closing(self.place.store()) as store:
            found = store.read(LEASE_KEY)
        assert found is not None
        lease = parse_lease(found.body)
        assert lease is not None
        return lease


@pytest.fixture
def hosts(fleet: Workers, tmp_path: Path, place: Place) -> Hosts:
    return Hosts(fleet, tmp_path, place)


@pytest.fixture
def local_hosts(fleet: Workers, tmp_path: Path) -> Hosts:
    return Hosts(fleet, tmp_path, in_directory(tmp_path / "replica"))


def _refused(worker: Worker, source: str) -> WorkerError:
    with pytest.raises(WorkerError) as caught:
        worker.run(source)
    return caught.value


def _lose(path: Path) -> None:
    """A new machine of the same name: the disk is empty."""
    shutil.rmtree(path.parent)
    path.parent.mkdir()


# -- one writer alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("chance", [(0.3, 0.0), (0.0, 0.3)], ids=["before", "after"])
def test_lost_requests_and_lost_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chance: tuple[float, float]
) -> None:
    """Requests of every kind, lease and segments, get lost or have their answers lost: the writer
    is never taken for a rival of its own."""
    stores = Stores(monkeypatch)
    database = Database(tmp_path, fence_lease=LEASE_S)
    monkeypatch.setattr("walship.replica.uploader.BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr("walship.replica.uploader.BACKOFF_LONGEST_S", 0.02)
    for _ in range(4):
        stores.fail(*chance)
        db = database.connect()
        db.execute("CREATE TABLE IF NOT EXISTS t (x)")
        for n in range(25):
            db.execute("INSERT INTO t VALUES (?)", (n,))
            database.sync()
            if n % 8 == 0:
                database.engine().fence._proof = float("-inf")  # as after an idle time
        stores.fail(0.0, 0.0)
        assert database.engine().uploader.fatal is None
        db.close()
    assert sum(store.faults["before"] + store.faults["after"] for store in stores.opened) > 40
    database.assert_replica_equals_file()


def _s3(endpoint: RecordingEndpoint, **more: object) -> dict[str, object]:
    return {
        "bucket": "bucket",
        "path": "app",
        "endpoint": endpoint.url,
        "access-key-id": "a",
        "secret-access-key": "b",
        "sync-interval": 0.0,
        **more,
    }


def test_an_idle_database_sends_nothing(tmp_path: Path) -> None:
    """Not for as long as it is idle, lease or no lease; the next commit renews and is shipped."""
    with recording_endpoint() as endpoint:
        db = walship.connect(tmp_path / "app.db", _s3(endpoint), fence_lease=LEASE_S)
        db.execute("CREATE TABLE t (x)")
        walship.replication(db).sync(WAIT_S)
        before = len(endpoint.requests)
        time.sleep(1.5 * LEASE_S)
        assert len(endpoint.requests) == before
        assert walship.replication(db).status().fence == "idle"
        db.execute("INSERT INTO t VALUES (1)")
        walship.replication(db).sync(WAIT_S)
        txid = f"{walship.replication(db).status().txid:016x}"
        sent = [request.path.rpartition("/")[2] for request in endpoint.requests[before:]]
        assert sent == [LEASE_KEY, f"{txid}-{txid}.ltx"]
        assert walship.replication(db).status().fence == "held"
        db.close()


CANNOT: dict[str, Callable[[Request], Answer | None]] = {
    # As the S3 interface of Google Cloud Storage does, and Backblaze.
    "ignores": lambda request: None,
    "refuses": lambda request: (
        error_answer(501, "NotImplemented")
        if request.method == "PUT" and {"if-match", "if-none-match"} & request.headers.keys()
        else None
    ),
}


@pytest.mark.parametrize("how", CANNOT)
def test_a_store_without_conditional_writes(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """auto says so once and goes on; required refuses to start; off does not even try."""
    with recording_endpoint() as endpoint:
        endpoint.answer = CANNOT[how]
        endpoint.ignores_conditions = how == "ignores"
        for name in ("a", "b"):  # nobody waits for a lease there
            path = tmp_path / name / "app.db"
            path.parent.mkdir()
            db = walship.connect(path, _s3(endpoint))
            db.execute("CREATE TABLE IF NOT EXISTS t (x)")
            for n in range(3):
                db.execute("INSERT INTO t VALUES (?)", (n,))
                walship.replication(db).sync(WAIT_S)
            assert walship.replication(db).status().fence == "none"
            db.close()
        told = [r for r in caplog.records if "cannot keep a second writer out" in r.message]
        assert len(told) == 2  # one for each
        assert "cannot replicate" not in caplog.text
        with pytest.raises(walship.RefusedError, match=r"fence: required.*walship doctor"):
            walship.connect(tmp_path / "a" / "app.db", _s3(endpoint), fence="required")
        before = len(endpoint.requests)
        with contextlib.closing(
            walship.connect(tmp_path / "c.db", _s3(endpoint, path="c"), fence="off")
        ) as db:
            db.execute("CREATE TABLE t (x)")
            walship.replication(db).sync(WAIT_S)
        assert not any(request.path.endswith(LEASE_KEY) for request in endpoint.requests[before:])


# -- one after the other --------------------------------------------------------------------------


def test_a_second_host_is_refused(local_hosts: Hosts) -> None:
    """While the owner lives nobody else opens the replica; the owner is named, and goes on."""
    hosts = local_hosts
    a = hosts.start("a", fence_lease=30.0)
    a.run("insert()")
    b = hosts.start("b", opened=False)
    error = _refused(b, "open()")
    assert error.kind == "FencedError"
    assert f":{a.pid} ({hosts.path('a')})" in error.text
    assert "fence-wait" in error.text
    a.run("insert()")
    assert rows_of(hosts.restore()) == set(a.committed)


def test_a_clean_close_hands_over_at_once(local_hosts: Hosts) -> None:
    """The lease is given up by the last close: the next host need not wait for anything."""
    hosts = local_hosts
    for name in ("a", "b", "c"):
        worker = hosts.start(name, fence_lease=120.0)
        worker.run("insert(3); close()")
        assert hosts.lease().owner == ""
    assert rows_of(hosts.restore()) == hosts.fleet.committed()


def test_an_open_that_fails_leaves_the_replica_free(local_hosts: Hosts) -> None:
    """Who could not open the database keeps nobody else waiting for the lease."""
    a = local_hosts.start("a", opened=False, fence_lease=120.0)
    error = _refused(a, "open(flags=2)")  # of a file that is not there, and shall not be made
    assert error.kind == "CantOpenError"
    b = local_hosts.start("b", fence_lease=120.0)
    b.run("insert()")
    assert rows_of(local_hosts.restore()) == set(b.committed)


def test_after_sigkill_the_same_disk_goes_on_at_once(local_hosts: Hosts) -> None:
    """It knows the nonce of the lease that its dead process held, with whatever process comes."""
    hosts = local_hosts
    for _ in range(3):
        worker = hosts.start("a", fence_lease=120.0)
        worker.run("insert(3)")
        worker.kill()
    assert rows_of(hosts.restore()) == hosts.fleet.committed()


def test_after_sigkill_the_same_machine_goes_on_at_once(local_hosts: Hosts) -> None:
    """A process that sees that the owner is gone need not wait, whatever directory it has."""
    first = local_hosts.fleet(
        local_hosts.path("a"), local_hosts.place.ours, fence_lease=120.0, durability="replica"
    )
    first.run("insert(3)")
    second = local_hosts.fleet(
        local_hosts.path("b"), local_hosts.place.ours, fence_lease=120.0, opened=False
    )
    assert _refused(second, "open()").kind == "FencedError"
    first.kill()
    second.run("open(); insert(); sync()")
    assert rows_of(local_hosts.restore()) == local_hosts.fleet.committed()


def test_after_sigkill_another_machine_waits_for_the_lease(hosts: Hosts) -> None:
    """The lease's end decides, by the store's clock; all that was acknowledged is there."""
    a = hosts.start("a")
    a.run("insert(3)")
    a.kill()
    b = hosts.start("b", opened=False)
    assert _refused(b, "open()").kind == "FencedError"
    generation = hosts.lease().generation
    b.run("open(fence_wait=30); insert()")
    lease = hosts.lease()
    assert lease.generation == generation + 1
    assert rows_of(hosts.restore()) == hosts.fleet.committed()


# -- both at once ---------------------------------------------------------------------------------


def test_a_paused_writer_finds_itself_fenced(hosts: Hosts) -> None:
    """Stopped for longer than its lease and continued: nothing it does harms the other one."""
    a = hosts.start("a")
    a.run("insert(3)")
    a.pause()
    b = hosts.start("b", fence_wait=30)
    b.run("insert(2)")
    kept = rows_of(hosts.restore())
    assert kept == hosts.fleet.committed()
    a.resume()
    error = _refused(a, "insert()")
    assert error.kind == "FencedError"
    assert f":{b.pid} ({hosts.path('b')})" in error.text
    assert rows_of(hosts.restore()) == kept
    b.run("insert()")
    assert rows_of(hosts.restore()) == hosts.fleet.committed()
    assert a.run("status()")["fence"] == "lost"
    assert a.run("status()")["state"] == "stopped"


@pytest.mark.parametrize("on_fenced", ["refuse", "local"])
def test_commits_of_the_loser(local_hosts: Hosts, on_fenced: str) -> None:
    """They are refused before they are made, or made here only; the log says which."""
    hosts = local_hosts
    a = hosts.start("a", on_fenced=on_fenced)
    a.run("insert(3)")
    a.pause()
    b = hosts.start("b", fence_wait=30)
    b.run("insert()")
    a.resume()
    assert _refused(a, "insert()").kind == "FencedError"
    kept = hosts.fleet.committed()
    count = "db.execute('SELECT count(*) FROM rows').fetchall()[0][0]"
    before = a.run(count)
    if on_fenced == "refuse":
        error = _refused(a, "db.execute('BEGIN'); insert(); db.execute('COMMIT')")
        assert error.kind == "FencedError"
        a.run("db.in_transaction and db.execute('ROLLBACK')")
        assert a.run(count) == before
        assert "ERROR walship.uploader: app.db: " in a.log()
    else:
        a.run("own = walship.connect(job['path'], durability='async')")
        state = hosts.path("a").parent / ".app.db-walship"
        a.run("insert(60, 30000, db=own)")
        a.run("own.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()")
        assert a.run(count) == before + 60
        assert "commits go on here, and are not shipped any more" in a.log()
        # Nothing piles up for a replica that does not want it.
        assert sum(file.stat().st_size for file in state.iterdir()) < 2 << 20
    assert rows_of(hosts.restore()) == kept
    assert b.run("insert()") == 2


def test_opening_what_another_host_owns(local_hosts: Hosts) -> None:
    """``on-fenced: local``: it opens, says that nothing is shipped, and does so again later."""
    hosts = local_hosts
    a = hosts.start("a")
    a.run("insert(3)")
    insert = "own.execute('INSERT INTO rows VALUES (?, 0, 0)', ('local NUMBER',))"
    for number in range(3):  # the owner is alive, goes on, and at last is gone
        b = hosts.start("b", on_fenced="local")
        b.run("own = walship.connect(job['path'], durability='async')")
        b.run(insert.replace("NUMBER", str(number)))
        assert len(b.run("own.execute('SELECT * FROM rows').fetchall()")) == 4 + number
        assert b.run("status()")["state"] == "stopped"
        assert "commits go on here, and are not shipped any more" in b.log()
        b.finish()
        a.run("insert()" if number == 0 else "close()")
    assert rows_of(hosts.restore()) == hosts.fleet.committed()


def test_a_copy_of_a_state_directory(hosts: Hosts) -> None:
    """Database and state were copied to another machine and both run: both are told, none of what
    either acknowledged is lost."""
    a = hosts.start("a")
    a.run("insert(3)")
    a.pause()
    disk = hosts.path("a").parent
    shutil.copytree(disk, disk.with_name("b"), ignore=shutil.ignore_patterns("*.fifo"))
    a.resume()
    b = hosts.start("b")  # it knows the nonce
    errors = []
    for worker in (a, b, a, b):
        try:
            worker.run("insert()")
        except WorkerError as error:
            errors.append(error)
            assert error.kind in ("FencedError", "ContinuityError")
    assert errors
    assert hosts.fleet.committed() <= rows_of(hosts.restore())


def _die_sending(hosts: Hosts, last: str) -> tuple[int, set[Row]]:
    """A writer that dies after its ``last`` commits; the TXID before them, and what it holds."""
    a = hosts.start("a")
    a.run("insert(2)")
    acknowledged = int(a.run("engine().uploader.replicated_txid"))
    kept = set(a.committed)
    a.run(last)
    a.kill()
    return acknowledged, kept


def test_what_a_dead_writer_had_in_flight(
    fleet: Workers, tmp_path: Path, minio_server: S3Endpoint
) -> None:
    """It died with one segment lost and later ones through: those are not mixed with the new
    owner's, not even for a moment."""
    bucket = minio_server.make_bucket()
    hosts = Hosts(fleet, tmp_path, Place(minio_server.replica(bucket, "app"), ""))
    acknowledged, kept = _die_sending(hosts, "insert(3)")
    client = minio_server.client()
    lost = f"{acknowledged + 1:016x}"
    client.delete_object(Bucket=bucket, Key=f"app/0000/{lost}-{lost}.ltx")
    b = hosts.start("b", fence_wait=30)
    assert rows_of(hosts.path("b")) == kept
    b.run("insert()")
    assert b.run("engine().uploader.replicated_txid") == acknowledged + 1
    assert rows_of(hosts.restore()) == rows_of(hosts.path("b")) == kept | set(b.committed)


def test_what_a_former_writer_had_in_flight_comes_late(
    fleet: Workers, tmp_path: Path, minio_server: S3Endpoint
) -> None:
    """It lands when another one has the lease, under that one's next TXIDs: that one goes on
    behind, and nothing of it is in the database any more."""
    bucket = minio_server.make_bucket()
    hosts = Hosts(fleet, tmp_path, Place(minio_server.replica(bucket, "app"), ""))
    acknowledged, kept = _die_sending(hosts, "insert(2, 20000)")
    client = minio_server.client()
    names = [f"{acknowledged + n:016x}" for n in (1, 2)]
    keys = [f"app/0000/{name}-{name}.ltx" for name in names]
    late = [client.get_object(Bucket=bucket, Key=key) for key in keys]
    bodies = [found["Body"].read() for found in late]
    for key in keys:
        client.delete_object(Bucket=bucket, Key=key)
    b = hosts.start("b", fence_wait=30)
    assert rows_of(hosts.path("b")) == kept
    for key, found, body in zip(keys, late, bodies, strict=True):
        client.put_object(Bucket=bucket, Key=key, Body=body, Metadata=found["Metadata"])
    b.run("insert()")
    assert b.run("engine().uploader.replicated_txid") == acknowledged + 3
    assert b.log().count("a former writer's upload came late") == 4, "said and done, twice"
    assert rows_of(hosts.restore()) == kept | set(b.committed)
    b.run("insert()")
    assert rows_of(hosts.restore()) == kept | set(b.committed)


def test_two_hosts_fight(hosts: Hosts, litestream: Path, tmp_path: Path) -> None:
    """Killed, paused, closed, with new disks and old ones: one history, restorable by either
    program, with everything that was ever acknowledged; whoever loses is told by whom."""
    told: list[str] = []
    failures: list[BaseException] = []
    end = time.monotonic() + FIGHT_S
    owners = {name: hosts.path(name) for name in ("a", "b")}

    def live(name: str, seed: int) -> None:
        rng = random.Random(seed)
        try:
            while time.monotonic() < end:
                if rng.random() < 0.5:
                    _lose(owners[name])
                worker = hosts.start(name, opened=False)
                _live_once(worker, rng)
                worker.dispose()
        except BaseException as error:
            failures.append(error)

    def _live_once(worker: Worker, rng: random.Random) -> None:
        try:
            worker.run(f"open(fence_wait={rng.choice((0, 1, 10))})")
            worker.run(f"write({rng.choice((0.0, 0.02, 0.3))})")
            time.sleep(rng.random() * 2)
            fate = rng.choice(("kill", "close", "pause", "pause"))
            if fate == "kill":
                worker.kill()
                return
            if fate == "pause":
                worker.pause()
                time.sleep(rng.random() * 2.5 * LEASE_S)
                worker.resume()
                time.sleep(0.2)
            worker.run("stop()")
            worker.run("close()")
        except WorkerError as error:
            assert error.kind in ("FencedError", "ContinuityError"), error
            told.append(f"{error.kind}: {error.text}")
            if error.kind == "ContinuityError":
                worker.kill()
                _lose(owners[worker.path.parent.name])

    threads = [threading.Thread(target=live, args=(name, seed)) for seed, name in enumerate(owners)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    fenced = [text for text in told if text.startswith("FencedError")]
    assert any(str(path) in text for path in owners.values() for text in fenced), told
    committed = hosts.fleet.committed()
    assert committed
    assert committed <= rows_of(hosts.restore())
    # A last one comes and goes on.
    _lose(owners["a"])
    last = hosts.start("a", fence_wait=30)
    last.run("insert(3); close()")
    expected = rows_of(owners["a"])
    assert hosts.fleet.committed() <= expected
    assert rows_of(hosts.restore()) == expected
    other = Litestream(litestream, tmp_path, tmp_path / "app.db", hosts.place)
    assert rows_of(other.restore(tmp_path / "by-litestream.db")) == expected


# -- Litestream, which asks nobody ----------------------------------------------------------------


def _write_plainly(path: Path, first: int, count: int) -> None:
    """Rows of a program that knows nothing of walship."""
    db = sqlite3.connect(path, timeout=10, isolation_level=None)
    for n in range(first, first + count):
        db.execute("INSERT INTO rows VALUES ('plain', ?, randomblob(50))", (n,))
        time.sleep(0.02)
    db.close()


@pytest.mark.parametrize("first", ["walship", "litestream"])
def test_litestream_as_the_second_writer(
    fleet: Workers, tmp_path: Path, minio_server: S3Endpoint, litestream: Path, first: str
) -> None:
    """Two machines, one with walship and one with Litestream, in either order: walship is told and
    stops, and the replica can be restored."""
    hosts = Hosts(fleet, tmp_path, in_bucket(minio_server))
    a = hosts.start("a", fence_lease=30.0)
    a.run("insert(5)")
    other = Litestream(litestream, tmp_path, tmp_path / "other.db", hosts.place)
    if first == "litestream":
        a.run("close()")
    other.restore(other.database)
    with other.replicating():
        _write_plainly(other.database, 1, 5)
        if first == "litestream":
            while ("plain", 5) not in rows_of(hosts.restore()):
                time.sleep(0.1)
            assert _refused(a, "open()").kind == "ContinuityError"  # its disk is behind
            a = hosts.start("b", fence_lease=30.0)
        # What Litestream has written over an object of ours is found by looking back.
        a.run("import walship.replica.uploader as uploader; uploader._LOOK_BACK_S = 1.0")
        for n in range(200):
            _write_plainly(other.database, 10 + n, 1)
            try:
                a.run("insert()")
            except WorkerError as caught:
                error = caught
                break
        else:
            raise AssertionError("nobody told walship")
        assert error.kind == "FencedError"
        assert "Litestream, perhaps" in error.text
        assert _refused(a, "insert()").kind == "FencedError"
        _write_plainly(other.database, 1000, 5)
        plain = rows_of(other.database)
        while not plain <= rows_of(hosts.restore()):
            time.sleep(0.1)
    assert rows_of(hosts.restore()) == plain
