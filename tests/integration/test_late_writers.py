"""What a writer sends after it was taken over from: never acknowledged, and never mixed in.

The store is one in memory, with S3's metadata, so that objects can be put there as a writer that
slept would have.
"""

from __future__ import annotations

import hashlib
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apsw
import pytest

import walship
from support.clock import FakeClock
from support.databases import WAIT_S
from support.memory import MemoryStore, Object
from walship.replica.clock import SystemClock
from walship.replica.config.sources import database_settings
from walship.replica.engine import restore_if_missing
from walship.replica.fence import LEASE_KEY, Fence
from walship.replica.restore import restore
from walship.replica.sender import Sender
from walship.replica.spool import Sealed, State
from walship.replica.sqlite import FencedError
from walship.replica.store.base import PREVIOUS_METADATA, SHA256_METADATA

REPLICA = "s3://bucket/app"
FIRST = "0000/0000000000000001-0000000000000001.ltx"


class World:
    """One replica in memory, and databases that are opened one after the other."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.objects: dict[str, Object] = {}
        self.store = MemoryStore(self.objects, REPLICA)
        monkeypatch.setattr("walship.replica.host.open_store", lambda *_: self.store)

    def path(self, host: str) -> Path:
        disk = self.directory / host
        disk.mkdir(exist_ok=True)
        return disk / "app.db"

    def write(self, host: str, *values: str) -> None:
        """Commit these rows, each in a TXID of its own, and close."""
        with closing(walship.connect(self.path(host), REPLICA)) as db:
            db.execute("CREATE TABLE IF NOT EXISTS t (x)")
            for value in values:
                db.execute("INSERT INTO t VALUES (?)", (value,))
                walship.replication(db).sync(WAIT_S)

    def run(self, host: str, sql: str) -> None:
        """Commit one statement, and close."""
        with closing(walship.connect(self.path(host), REPLICA)) as db:
            db.execute(sql)

    def rows(self, host: str) -> list[str]:
        with closing(walship.connect(self.path(host), REPLICA)) as db:
            return [x for (x,) in db.execute("SELECT x FROM t ORDER BY rowid")]

    def restored(self) -> list[str]:
        output = self.directory / "restored.db"
        restore(self.store, output, clock=SystemClock(), overwrite=True, integrity_check="full")
        with closing(apsw.Connection(str(output))) as db:
            return [x for (x,) in db.execute("SELECT x FROM t ORDER BY rowid")]

    def segments(self) -> list[str]:
        return sorted(key for key in self.objects if key.startswith("0000/"))

    def broken(self) -> list[int]:
        """TXIDs of segments that name another predecessor than the one that is there."""
        metadata = [self.objects[key].metadata for key in self.segments()]
        return [
            txid
            for txid, (before, found) in enumerate(pairwise(metadata), 2)
            if found[PREVIOUS_METADATA] != before[SHA256_METADATA]
        ]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def _sleep_and_wake(world: World, *late: str) -> dict[str, Object]:
    """Host a writes and sleeps; b takes over and writes one more TXID; then what a had on its way
    arrives behind it: first the row that b's TXID is in the place of, then these.  Returns it."""
    world.write("a", "a1", "a2")
    before = dict(world.objects)
    world.write("a", "lost", *late)
    sent = {key: made for key, made in world.objects.items() if key not in before}
    world.objects.clear()
    world.objects.update(before)
    world.write("b", "b1")
    for key, made in sent.items():
        world.objects.setdefault(key, made)
    return sent


def test_the_history_is_a_chain(world: World) -> None:
    """Each segment names the one before it, across restarts and hosts."""
    world.write("a", "a1")
    world.write("a", "a2")
    world.write("b", "b1", "b2")
    world.write("a2", "a3")
    assert len(world.segments()) >= 5
    assert world.broken() == []


def test_a_restore_leaves_it_out(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Restored in the moment in which it lies there, the database is the new writer's."""
    _sleep_and_wake(world, "late1", "late2")
    assert world.broken() == [len(world.segments()) - 1]
    assert world.restored() == ["a1", "a2", "b1"]
    assert "another writer has put" in caplog.text


def test_the_next_owner_replaces_it(world: World) -> None:
    """Whoever takes over next goes on behind what was acknowledged; so does the present one."""
    _sleep_and_wake(world, "late1", "late2")
    world.write("c", "c1", "c2")
    assert world.restored() == world.rows("c") == ["a1", "a2", "b1", "c1", "c2"]
    assert world.broken() == []


def test_the_present_owner_replaces_it(world: World) -> None:
    """It finds its next TXID taken by what rests on something else, and puts its own there."""
    sent = _sleep_and_wake(world)
    with closing(walship.connect(world.path("b"), REPLICA)) as db:
        newest = len(world.segments())
        for late in range(newest + 1, newest + 4):  # what comes in while it is at work
            world.objects[f"0000/{late:016x}-{late:016x}.ltx"] = next(iter(sent.values()))
        db.execute("INSERT INTO t VALUES ('b2')")
        walship.replication(db).sync(WAIT_S)
        assert world.restored() == ["a1", "a2", "b1", "b2"]
        db.execute("INSERT INTO t VALUES ('b3')")
        walship.replication(db).sync(WAIT_S)
    assert world.restored() == ["a1", "a2", "b1", "b2", "b3"]


def test_catching_up_leaves_it_out(world: World) -> None:
    """A host that restored earlier and waited for the lease does not take it in."""
    world.write("a", "a1", "a2")
    _restore_only(world, "c")
    saved = dict(world.objects)
    world.write("a", "lost", "late1")
    sent = {key: made for key, made in world.objects.items() if key not in saved}
    world.objects.clear()
    world.objects.update(saved)
    world.write("b", "b1")
    for key, made in sent.items():
        world.objects.setdefault(key, made)
    assert world.rows("c") == ["a1", "a2", "b1"]
    world.write("c", "c1")
    assert world.restored() == world.rows("c") == ["a1", "a2", "b1", "c1"]


def _restore_only(world: World, host: str) -> None:
    settings = database_settings(world.path(host), REPLICA)
    assert restore_if_missing(settings)


def test_a_host_that_restored_it_starts_over(world: World) -> None:
    """The newest segment was replaced since a waiting host restored: Litestream does not ask."""
    first = "a" * 20_000  # on pages that nobody else touches
    world.write("a", first, "a2")
    saved = dict(world.objects)
    world.run("a", f"UPDATE t SET x = '{'b' * 20_000}' WHERE rowid = 1")
    _restore_only(world, "c")
    world.objects.clear()
    world.objects.update(saved)
    world.write("b", "b1")
    world.write("b", "b2")
    assert world.rows("c") == [first, "a2", "b1", "b2"]
    world.write("c", "c1")
    assert world.restored() == world.rows("c") == [first, "a2", "b1", "b2", "c1"]


# -- sending --------------------------------------------------------------------------------------


class Frozen:
    """Stands in for a capture: one frozen segment."""

    def __init__(self, body: bytes) -> None:
        self.record = SimpleNamespace(body=lambda sealed: body)
        self.state = State()


class Notes:
    def __init__(self) -> None:
        self.known: tuple[str, ...] = ()

    def nonces(self) -> tuple[str, ...]:
        return self.known

    def keep_nonces(self, nonces: tuple[str, ...]) -> None:
        self.known = nonces

    def is_tested(self) -> bool:
        return True

    def keep_tested(self) -> None:
        pass


class Writer:
    """A fence and a sender."""

    def __init__(self, store: MemoryStore, clock: FakeClock, owner: str) -> None:
        self.fence = Fence(
            store, clock, Notes(), policy="auto", lease_s=30.0, wait_s=0.0, owner=owner
        )
        self._store, self._clock = store, clock

    def send(self, txid: int, body: bytes) -> float | None:
        capture: Any = Frozen(body)
        digest = hashlib.sha256(body).hexdigest()
        sender = Sender("app.db", capture, self._store, self.fence, self._clock)
        return sender.send(Sealed(txid=txid, size_bytes=len(body), sha256=digest))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> MemoryStore:
    return MemoryStore({}, clock=clock)


def test_nothing_is_sent_on_a_lease_that_may_have_run_out(
    store: MemoryStore, clock: FakeClock
) -> None:
    """The lease is renewed first; who was taken over from learns it then, and sends nothing."""
    a = Writer(store, clock, "a")
    a.fence.acquire()
    a.send(1, b"a1")
    puts: list[str] = []
    store.before = lambda key, made: puts.append(key)
    clock.advance(29)
    a.send(2, b"a2")
    assert puts == [FIRST.replace("1", "2")]
    clock.advance(32)
    a.send(3, b"a3")
    assert puts[1:] == [LEASE_KEY, FIRST.replace("1", "3")]
    clock.advance(33)
    b = Writer(store, clock, "b")
    b.fence.acquire()
    with pytest.raises(FencedError, match="taken over by b"):
        a.send(4, b"a4")
    assert len(store.objects) == 4
    b.send(4, b"b4")
