"""Commits that wait: they return when the replica has them, and not a moment earlier."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

import walship
from support.databases import WAIT_S, Database, Stores, dump
from walship import aio
from walship.middleware import DurableASGI, DurableWSGI
from walship.vfs import turns
from walship.vfs.registry import registry


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stores]:
    found = Stores(monkeypatch)
    yield found
    found.release()


def _ready(database: Database, **settings: Any) -> walship.Connection:
    connection = database.connect(**settings)
    connection.execute("CREATE TABLE IF NOT EXISTS t (x)")
    database.sync()
    return connection


def _assert_waits(stores: Stores, action: Callable[[], object]) -> None:
    """``action`` returns only after the store has answered its PUT."""
    stores.block(["put"])
    returned = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)
        returned.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not stores.last.waiting:
            assert not returned.wait(0.01), "it returned before anything was sent"
        assert not returned.is_set()
    finally:
        stores.release()
    assert returned.wait(WAIT_S)
    thread.join()
    assert not failures, failures


STATEMENTS: dict[str, Callable[[walship.Connection], object]] = {
    "autocommit": lambda db: db.execute("INSERT INTO t VALUES (1)"),
    "many": lambda db: db.executemany("INSERT INTO t VALUES (?)", [(1,), (2,)]),
    "explicit": lambda db: db.execute("BEGIN; INSERT INTO t VALUES (1); COMMIT"),
    "savepoint": lambda db: db.execute("SAVEPOINT s; INSERT INTO t VALUES (1); RELEASE s"),
    "schema": lambda db: db.execute("CREATE TABLE u (y)"),
    "pragma": lambda db: db.pragma("user_version", 7),
    "vacuum": lambda db: db.execute("VACUUM"),
    "returning": lambda db: db.execute("INSERT INTO t VALUES (1) RETURNING x").fetchall(),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_durable_commit_waits(tmp_path: Path, stores: Stores, name: str) -> None:
    """Every kind of commit on a durable connection returns after the acknowledgement."""
    database = Database(tmp_path)
    db = _ready(database, durability="replica")
    _assert_waits(stores, lambda: STATEMENTS[name](db))
    restored = database.restore()
    assert dump(restored) == dump(database.path)
    db.close()


def test_a_with_block_waits(tmp_path: Path, stores: Stores) -> None:
    """Likewise at the end of ``with db``."""
    database = Database(tmp_path)
    db = _ready(database, durability="replica")

    def block() -> None:
        with db:
            db.execute("INSERT INTO t VALUES (1)")

    _assert_waits(stores, block)
    db.close()


def test_returning_that_is_closed_early_waits(tmp_path: Path, stores: Stores) -> None:
    """SQLite calls no hook then; the cursor's close waits."""
    database = Database(tmp_path)
    db = _ready(database, durability="replica")
    cursor = db.cursor()
    cursor.execute("INSERT INTO t VALUES (1), (2) RETURNING x")
    assert next(cursor) == (1,)
    _assert_waits(stores, cursor.close)
    db.close()


def test_async_commits_do_not_wait(tmp_path: Path, stores: Stores) -> None:
    """The default returns although the store does not answer; so do reads and roll-backs."""
    database = Database(tmp_path)
    db = _ready(database)
    durable = database.connect(durability="replica")
    stores.block(["put"])
    db.execute("INSERT INTO t VALUES (1)")
    assert durable.execute("SELECT count(*) FROM t").fetchall() == [(1,)]
    durable.execute("BEGIN; INSERT INTO t VALUES (2); ROLLBACK")
    stores.release()
    durable.close()
    db.close()


def test_a_timeout_says_that_the_commit_is_local(tmp_path: Path, stores: Stores) -> None:
    """NotYetReplicated comes out of the statement; the row is there and is shipped later."""
    database = Database(tmp_path)
    db = _ready(database, durability="replica", durability_timeout=0.05)
    stores.block(["put"])
    with pytest.raises(walship.NotYetReplicated, match="safe on this disk and will be shipped"):
        db.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(walship.NotYetReplicated), db:
        db.execute("INSERT INTO t VALUES (2)")
    assert db.execute("SELECT count(*) FROM t").fetchall() == [(2,)]
    assert not db.in_transaction
    stores.release()
    database.assert_replica_equals_now()
    db.close()


def test_one_transaction_waits(tmp_path: Path, stores: Stores) -> None:
    """`walship.durable` waits at its end; an exception inside rolls back and does not wait."""
    database = Database(tmp_path)
    db = _ready(database)

    def transaction() -> None:
        with walship.durable(db, timeout=WAIT_S) as inside:
            inside.execute("INSERT INTO t VALUES (1)")

    _assert_waits(stores, transaction)
    again = walship.durable(db, timeout=WAIT_S)
    for _ in range(2):
        with again:
            pass
    stores.block(["put"])
    with pytest.raises(ZeroDivisionError), walship.durable(db):
        db.execute("INSERT INTO t VALUES (2)")
        raise ZeroDivisionError
    with walship.durable(db):
        assert db.execute("SELECT count(*) FROM t").fetchall() == [(1,)]
    with pytest.raises(walship.NotYetReplicated), walship.durable(db, timeout=0.05):
        db.execute("INSERT INTO t VALUES (3)")
    db.execute("BEGIN IMMEDIATE")
    with pytest.raises(walship.RefusedError, match="wait for itself"), walship.durable(db):
        pass
    db.execute("ROLLBACK")
    stores.release()
    db.close()


def test_waiting_commits_share_segments(tmp_path: Path, stores: Stores) -> None:
    """Sixteen writers that wait: far fewer segments than commits, and all of them are there."""
    database = Database(tmp_path)
    db = _ready(database)

    before = len(database.segments())

    def work(number: int) -> None:
        own = database.connect(durability="replica", busy_timeout=WAIT_S)
        for n in range(5):
            own.execute("INSERT INTO t VALUES (?)", (number * 100 + n,))
        own.close()

    stores.block(["put"])
    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    while not stores.last.waiting:
        threads[0].join(0.01)
    stores.release()
    for thread in threads:
        thread.join()
    assert db.execute("SELECT count(*) FROM t").fetchall() == [(80,)]
    assert len(database.segments()) - before < 80
    database.assert_replica_equals_now()
    db.close()


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for the write lock goes on only when it is woken."""
    monkeypatch.setattr(turns, "_PAUSES_S", (3600.0,))
    monkeypatch.setattr(turns, "_BEHIND_S", 3600.0)


@pytest.mark.usefixtures("asleep")
@pytest.mark.parametrize("set_later", [False, True])
def test_writers_wake_each_other(tmp_path: Path, set_later: bool) -> None:
    """Writers that find the write lock taken queue, and each that has committed wakes the next, in
    the order in which they came; whichever way the busy timeout was set."""
    database = Database(tmp_path)
    db = _ready(database, durability="replica")
    queue = registry.turns(str(database.path))
    order: list[int] = []

    def work(number: int) -> None:
        own = database.connect(durability="replica", busy_timeout=0.01 if set_later else 3600)
        if set_later:
            own.set_busy_timeout(3_600_000)
        own.execute("BEGIN IMMEDIATE")
        order.append(number)
        own.execute("INSERT INTO t VALUES (?); COMMIT", (number,))
        own.close()

    db.execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (0)")
    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(1, 4)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        _until(lambda number=number: len(queue._waiting) == number)  # type: ignore[misc]
    db.execute("COMMIT")
    for thread in threads:
        thread.join(WAIT_S)
    assert order == [1, 2, 3]
    assert db.execute("SELECT x FROM t").fetchall() == [(n,) for n in range(4)]
    assert not queue._waiting
    db.close()


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_the_queue_ends_with_the_busy_timeout(tmp_path: Path, timeout: float) -> None:
    """One that waited its busy timeout for the write lock gets BusyError, and leaves the queue."""
    database = Database(tmp_path)
    db = _ready(database, durability="replica")
    other = database.connect(durability="replica", busy_timeout=timeout)
    db.execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (0)")
    with pytest.raises(apsw.BusyError):
        other.execute("INSERT INTO t VALUES (1)")
    assert not registry.turns(str(database.path))._waiting
    db.execute("COMMIT")
    other.execute("INSERT INTO t VALUES (2)")
    other.close()
    db.close()


@pytest.mark.parametrize("end", ["ROLLBACK", "COMMIT"])
def test_a_lock_that_nobody_hands_on(tmp_path: Path, end: str) -> None:
    """A writer that rolls back, or does not wait for the replica, wakes nobody: who waits looks."""
    database = Database(tmp_path)
    db = _ready(database)
    holder = database.connect(durability="replica" if end == "ROLLBACK" else "async")
    queue = registry.turns(str(database.path))

    def work() -> None:
        own = database.connect(durability="replica", busy_timeout=WAIT_S)
        own.execute("INSERT INTO t VALUES (1)")
        own.close()

    holder.execute("BEGIN IMMEDIATE; INSERT INTO t VALUES (0)")
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    _until(lambda: bool(queue._waiting))
    holder.execute(end)
    for thread in threads:
        thread.join()
    assert db.execute("SELECT sum(x) FROM t").get == 3
    holder.close()
    db.close()


def test_a_commit_does_not_wait_for_other_openings(tmp_path: Path) -> None:
    """While another database is being opened, which may take long, durable commits go on."""
    database = Database(tmp_path)
    db = _ready(database, durability="replica")
    opening, done, committed = threading.Event(), threading.Event(), threading.Event()

    def open_slowly() -> None:
        with registry._lock:  # as `Registry.acquire` has it
            opening.set()
            done.wait(2 * WAIT_S)

    def commit() -> None:
        db.execute("INSERT INTO t VALUES (1)")
        committed.set()

    threads = [threading.Thread(target=work, daemon=True) for work in (open_slowly, commit)]
    threads[0].start()
    opening.wait(WAIT_S)
    threads[1].start()
    try:
        assert committed.wait(WAIT_S)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    db.close()


def test_segments_in_flight_are_spread(tmp_path: Path, stores: Stores) -> None:
    """While a segment is in flight the next one gathers commits for a share of the time that one
    takes, although it could go at once; when nothing is in flight any more it goes."""
    database = Database(tmp_path)
    db = _ready(database)
    uploader = database.engine().uploader
    assert uploader._stride_s > 0, "the time that segments took was not noted"
    uploader._max_in_flight = 4  # as with an object store
    before = uploader.progress.uploads
    stores.block(["put"])
    try:
        db.execute("INSERT INTO t VALUES (0)")
        futures = [database.engine().sync_future()]
        _until(lambda: bool(stores.last.waiting))
        uploader._stride_s = 3600.0
        for number in range(1, 4):
            db.execute("INSERT INTO t VALUES (?)", (number,))
            futures.append(database.engine().sync_future())
            _until(lambda: uploader._wake.locked())  # it has seen that
    finally:
        stores.release()
    for future in futures:
        future.result(WAIT_S)
    assert uploader.progress.uploads - before == 2
    assert dump(database.restore()) == dump(database.path)
    db.close()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_hook_checkpoints(tmp_path: Path) -> None:
    """The hook takes the place of SQLite's autocheckpoint: the WAL does not grow for ever."""
    database = Database(tmp_path, page_size=512)
    db = _ready(database, durability="replica", min_checkpoint_page_count=10)
    for n in range(60):
        db.execute("INSERT INTO t VALUES (?)", (bytes(400) + bytes([n]),))
    assert (tmp_path / "app.db-wal").stat().st_size < 60 * 3 * 536
    db.close()


def test_asyncio_waits(tmp_path: Path, stores: Stores) -> None:
    """Other tasks run meanwhile; a wait that is given up raises what `sync` does."""
    asyncio.run(_asyncio_waits(tmp_path, stores))


async def _asyncio_waits(tmp_path: Path, stores: Stores) -> None:
    database = Database(tmp_path)
    db = _ready(database)
    before = database.sync()
    stores.block(["put"])

    async def transaction() -> None:
        async with aio.durable(db):
            db.execute("INSERT INTO t VALUES (1)")

    task = asyncio.create_task(transaction())
    waiters = [asyncio.create_task(aio.wait(db)) for _ in range(64)]
    while not stores.last.waiting:
        await asyncio.sleep(0.001)
    assert not task.done()
    with pytest.raises(walship.NotYetReplicated):
        await aio.wait(db, timeout=0.01)
    waiters[0].cancel()
    stores.release()
    await asyncio.wait_for(task, WAIT_S)
    txids = await asyncio.wait_for(asyncio.gather(*waiters[1:]), WAIT_S)
    assert set(txids) == {before + 1}
    db.close()


async def _call(app: Any) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    await app({"type": "http"}, receive, send)
    return sent


def test_an_asgi_response_is_held(tmp_path: Path, stores: Stores) -> None:
    """A response waits for what its request wrote, also in a thread pool; others do not wait."""
    asyncio.run(_an_asgi_response_is_held(tmp_path, stores))


async def _an_asgi_response_is_held(tmp_path: Path, stores: Stores) -> None:
    database = Database(tmp_path)
    db = _ready(database)

    def make(write: bool) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if write:
                await asyncio.to_thread(db.execute, "INSERT INTO t VALUES (1)")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ok"})

        return app

    stores.block(["put"])
    task = asyncio.create_task(_call(DurableASGI(make(write=True))))
    while not stores.last.waiting:
        await asyncio.sleep(0.001)
    sent = await _call(DurableASGI(make(write=False)))
    assert [message.get("status") for message in sent] == [200, None]
    refused = await _call(DurableASGI(make(write=True), timeout=0.01))
    assert [message.get("status") for message in refused] == [503, None]
    assert b"has not been undone" in refused[1]["body"]
    assert not task.done()
    stores.release()
    assert (await asyncio.wait_for(task, WAIT_S))[0]["status"] == 200
    db.close()


def test_a_wsgi_response_is_held(tmp_path: Path, stores: Stores) -> None:
    """Likewise in WSGI, for what is written before the first part of the body."""
    database = Database(tmp_path)
    db = _ready(database)
    statuses: list[str] = []

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [])
        if environ["write"]:
            db.execute("INSERT INTO t VALUES (1)")
        yield b"ok"

    def call(write: bool, timeout: float | None = None) -> bytes:
        def start_response(status: str, headers: object) -> None:
            statuses.append(status)

        return b"".join(DurableWSGI(app, timeout)({"write": write}, start_response))

    _assert_waits(stores, lambda: call(write=True))
    stores.block(["put"])
    assert call(write=False) == b"ok"
    assert b"has not been undone" in call(write=True, timeout=0.05)
    assert statuses == ["200 OK", "200 OK", "503 Service Unavailable"]
    stores.release()
    db.close()


def test_unreplicated_databases_are_refused(tmp_path: Path) -> None:
    """Nobody waits for what has no replica: asking is an error, a durable block is a plain one."""
    db = walship.connect(tmp_path / "plain.db")
    with pytest.raises(walship.ClosedError):
        walship.replication(db).wait(1)
    with walship.durable(db):
        db.execute("CREATE TABLE t (x)")
    assert isinstance(db, apsw.Connection)
    db.close()
