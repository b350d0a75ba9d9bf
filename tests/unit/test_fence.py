"""The fence alone: a clock that moves when told to, a store in memory, and several hosts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import pytest

from support.clock import FakeClock
from support.memory import MemoryStore, Object
from walship.replica.errors import ClosedError, StoreError, StoreUnavailable
from walship.replica.fence import LEASE_KEY, Fence, Lease, parse_lease
from walship.replica.sqlite import FencedError, RefusedError
from walship.replica.store.base import Body, ObjectInfo, ObjectStore, segment_key

LEASE_S = 30.0


class Notes:
    """A state directory, as far as the fence has to do with it."""

    def __init__(self) -> None:
        self.known: tuple[str, ...] = ()
        self.tested = True

    def nonces(self) -> tuple[str, ...]:
        return self.known

    def keep_nonces(self, nonces: tuple[str, ...]) -> None:
        self.known = nonces

    def is_tested(self) -> bool:
        return self.tested

    def keep_tested(self) -> None:
        self.tested = True


class World:
    """One store, one clock, and whoever wants to write."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.objects: dict[str, Object] = {}
        self.store = MemoryStore(self.objects, clock=self.clock)
        self.gone: set[str] = set()

    def fence(
        self,
        owner: str,
        notes: Notes | None = None,
        *,
        policy: Literal["auto", "required", "off"] = "auto",
        wait_s: float = 0.0,
        store: ObjectStore | None = None,
        clock: FakeClock | None = None,
        ended: Callable[[], bool] = lambda: False,
    ) -> Fence:
        return Fence(
            store or self.store,
            clock or self.clock,
            notes or Notes(),
            policy=policy,
            lease_s=LEASE_S,
            wait_s=wait_s,
            owner=owner,
            process=owner,
            is_gone=lambda process: process in self.gone,
            ended=ended,
        )

    @property
    def lease(self) -> Lease:
        lease = parse_lease(self.objects[LEASE_KEY].body)
        assert lease is not None
        return lease

    def put_segment(self, txid: int) -> None:
        """What a writer does with a segment."""
        self.store.put(segment_key(self.store, 0, txid, txid), b"segment", if_absent=True)


@pytest.fixture
def world() -> World:
    return World()


def test_the_first_writer_takes_the_lease(world: World) -> None:
    """An empty replica: the lease is created, and holds from the moment the request was begun."""
    fence = world.fence("a")
    assert not fence.holds()
    fence.acquire()
    assert fence.holds()
    assert (world.lease.owner, world.lease.generation) == ("a", 1)
    content = json.loads(world.objects[LEASE_KEY].body)
    assert {"generation", "owner", "expires_at"} <= content.keys()


def test_it_holds_for_two_thirds_of_the_lease(world: World) -> None:
    """No acknowledgement on an older proof; a renewal is one, and so is an object created."""
    fence = world.fence("a")
    fence.acquire()
    world.clock.advance(LEASE_S / 2)
    assert fence.holds()
    assert fence.wants_renewal()
    world.clock.advance(LEASE_S / 6)
    assert not fence.holds()
    fence.renew()
    assert fence.holds()
    assert not fence.wants_renewal()
    world.clock.advance(LEASE_S / 2)
    fence.created(world.clock.monotonic())
    world.clock.advance(LEASE_S / 2)
    assert fence.holds()


def test_nothing_is_sent_on_a_lease_that_may_have_run_out(world: World) -> None:
    """Whoever slept for longer than the lease asks first; one that was taken over learns it."""
    fence = world.fence("a")
    fence.acquire()
    world.clock.advance(LEASE_S - 1)
    renewals = world.lease.renewals
    fence.ensure()
    assert world.lease.renewals == renewals
    world.clock.advance(1)
    fence.ensure()
    assert world.lease.renewals == renewals + 1
    assert fence.holds()
    world.clock.advance(LEASE_S + 3)
    world.fence("b").acquire()
    with pytest.raises(FencedError, match="taken over by b"):
        fence.ensure()


def test_another_host_is_refused_while_the_owner_lives(world: World) -> None:
    """The owner is named, with how long ago it was seen; nothing is changed."""
    world.fence("a").acquire()
    before = dict(world.objects)
    world.clock.advance(12)
    with pytest.raises(FencedError, match=r"belongs to a, last seen alive 12 s ago.*fence-wait"):
        world.fence("b").acquire()
    assert world.objects == before


def test_a_segment_is_a_sign_of_life(world: World) -> None:
    """The lease is as old as the newest object, for the owner need not renew while it writes."""
    a = world.fence("a")
    a.acquire()
    world.clock.advance(LEASE_S)
    world.put_segment(1)
    world.clock.advance(LEASE_S)
    with pytest.raises(FencedError, match="last seen alive 30 s ago"):
        world.fence("b").acquire()
    world.clock.advance(3)
    world.fence("b").acquire()
    assert (world.lease.owner, world.lease.generation) == ("b", 2)


def test_the_owner_that_was_outlived_is_told(world: World) -> None:
    """After a take-over the former owner cannot renew, and nothing it does makes it hold."""
    a = world.fence("a")
    a.acquire()
    world.clock.advance(LEASE_S + 3)
    world.fence("b").acquire()
    assert not a.holds()
    for _ in range(2):
        with pytest.raises(FencedError, match="taken over by b"):
            a.renew()
    assert a.rival() == "b"
    assert world.lease.owner == "b"


def test_the_same_state_directory_takes_it_back_at_once(world: World) -> None:
    """After SIGKILL: it knows the nonce."""
    notes = Notes()
    first = world.fence("a", notes)
    first.acquire()
    second = world.fence("a again", notes)
    second.acquire()
    assert world.lease.generation == 2
    with pytest.raises(FencedError):
        first.renew()


def test_who_sees_that_the_owner_is_gone_does_not_wait(world: World) -> None:
    """On the same machine, from another state directory."""
    world.fence("a").acquire()
    world.gone.add("a")
    b = world.fence("b")
    b.acquire()
    assert (world.lease.owner, world.lease.generation) == ("b", 2)


def test_a_lease_given_up_is_taken_at_once(world: World) -> None:
    """And whoever gave it up does not hold it any more, but can take it again."""
    a = world.fence("a")
    a.acquire()
    a.release()
    assert not a.holds()
    assert world.lease.owner == ""
    a.renew()
    assert (world.lease.owner, a.holds()) == ("a", True)
    a.release()
    world.fence("b").acquire()
    with pytest.raises(FencedError, match="taken over by b"):
        a.renew()


def test_waiting_for_the_owner(world: World) -> None:
    """fence-wait: until it is given up, or has run out, or the time has."""
    a = world.fence("a")
    a.acquire()
    b = world.fence("b", wait_s=100.0)
    start = world.clock.monotonic()
    b.acquire()
    assert LEASE_S <= world.clock.monotonic() - start <= LEASE_S + 3
    start = world.clock.monotonic()
    with pytest.raises(FencedError, match="belongs to b"):
        world.fence("c", wait_s=10.0).acquire()
    assert 10 <= world.clock.monotonic() - start < 11


def test_waiting_ends_when_nobody_wants_it(world: World) -> None:
    """Closing meanwhile is no word on who may write: it must not be taken for one."""
    world.fence("a").acquire()
    ended: list[bool] = []
    world.clock.sleep = lambda seconds: ended.append(True)  # type: ignore[method-assign]
    b = world.fence("b", wait_s=100.0, ended=lambda: bool(ended))
    with pytest.raises(ClosedError):
        b.acquire()


def test_waiting_lists_what_is_new(world: World) -> None:
    """While it waits it does not list a long replica again and again."""
    a = world.fence("a")
    a.acquire()
    for txid in range(1, 50):
        world.put_segment(txid)
    asked: list[str | None] = []
    inner = world.store.list

    def noting(prefix: str, start_after: str | None = None) -> Any:
        asked.append(start_after)
        return inner(prefix, start_after)

    world.store.list = noting  # type: ignore[method-assign]
    world.fence("b", wait_s=100.0).acquire()
    assert asked[0] is None
    assert len(asked) > 50
    assert all(key is not None and "0000000000000029" in key for key in asked[1:]), asked


def test_an_object_that_fills_a_gap_is_a_sign_of_life(world: World) -> None:
    """A segment that was sent again lies before others, and is younger."""
    a = world.fence("a")
    a.acquire()
    world.put_segment(2)
    world.clock.advance(LEASE_S - 5)
    world.put_segment(1)
    world.clock.advance(10)
    with pytest.raises(FencedError, match="last seen alive 10 s ago"):
        world.fence("b").acquire()


@pytest.mark.parametrize("txid", [1, 3])
def test_an_object_that_came_through_at_the_last_moment(world: World, txid: int) -> None:
    """Created between the look and the swap it is a sign of life: the new owner lets it run out."""
    a = world.fence("a")
    a.acquire()
    world.put_segment(2)
    world.clock.advance(LEASE_S + 3)

    def slip_in(key: str, made: Object | None) -> None:
        if key == LEASE_KEY:
            world.store.before = lambda key, made: None
            world.put_segment(txid)

    world.store.before = slip_in
    began = world.clock.monotonic()
    b = world.fence("b")
    b.acquire()
    assert world.clock.monotonic() - began >= LEASE_S
    assert b.holds()
    assert not a.holds()


def test_nothing_came_through_at_the_last_moment(world: World) -> None:
    """Then it does not wait, gaps or not."""
    a = world.fence("a")
    a.acquire()
    for txid in (*range(1, 20), 21):
        world.put_segment(txid)
    world.clock.advance(LEASE_S + 3)
    began = world.clock.monotonic()
    world.fence("b").acquire()
    assert world.clock.monotonic() == began


@pytest.mark.parametrize("step", ["acquire", "renew", "release"])
def test_lost_answers(world: World, step: str) -> None:
    """The request had its effect and its answer got lost: the next one finds that it is ours."""
    notes = Notes()
    fence = world.fence("a", notes)
    if step == "acquire":
        world.store.lost = 1
        with pytest.raises(StoreUnavailable):
            fence.acquire()
        fence.acquire()
    elif step == "renew":
        fence.acquire()
        world.clock.advance(LEASE_S)
        world.store.lost = 1
        with pytest.raises(StoreUnavailable):
            fence.renew()
        assert not fence.holds()
        fence.renew()
    else:
        fence.acquire()
        world.store.lost = 1
        fence.release()
        assert not fence.holds()
        assert world.lease.owner == ""
        fence.renew()
    assert fence.holds()
    assert world.lease.owner == "a"


def test_an_acquisition_that_lands_late(world: World) -> None:
    """A take-over whose answer never came lands behind another one of the same directory: the
    swap refuses it; and one that landed first is recognised by its nonce."""
    notes = Notes()
    first = world.fence("a", notes)
    world.store.lost = 1
    with pytest.raises(StoreUnavailable):
        first.acquire()
    for _ in range(6):
        world.store.away = True
        with pytest.raises(StoreUnavailable):
            first.acquire()
        world.store.away = False
    first.acquire()
    assert (world.lease.owner, first.holds()) == ("a", True)


def test_copies_of_a_state_directory_fence_each_other(world: World) -> None:
    """Whoever takes the lease with the other's memory ends the other's."""
    notes = Notes()
    a = world.fence("a", notes)
    a.acquire()
    copy = Notes()
    copy.known = notes.known
    b = world.fence("b", copy)
    b.acquire()
    with pytest.raises(FencedError):
        a.renew()


class Careless(MemoryStore):
    """A store that does not look at conditions."""

    def put(self, key: str, body: Body, **more: Any) -> ObjectInfo:
        more.pop("if_absent", None)
        more.pop("if_match", None)
        return super().put(key, body, **more)


class Without(MemoryStore):
    """A store that refuses conditions."""

    def put(self, key: str, body: Body, **more: Any) -> ObjectInfo:
        if more.get("if_absent") or more.get("if_match"):
            raise StoreError("not implemented", code="NotImplemented")
        return super().put(key, body, **more)


@pytest.mark.parametrize("kind", [Careless, Without])
def test_a_store_that_cannot(
    world: World, kind: type[MemoryStore], caplog: pytest.LogCaptureFixture
) -> None:
    """auto: one warning, and on it goes, also for the next host; required: refused."""
    store = kind(world.objects, clock=world.clock)
    for owner in ("a", "b"):
        notes = Notes()
        notes.tested = False
        fence = world.fence(owner, notes, store=store)
        fence.acquire()
        assert not fence.works
        assert fence.holds()
        assert not notes.tested
        fence.renew()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    notes = Notes()
    notes.tested = False
    with pytest.raises(RefusedError, match=r"fence: required.*walship doctor"):
        world.fence("c", notes, store=store, policy="required").acquire()


def test_a_store_that_can_is_asked_once(world: World) -> None:
    """What was seen to work is remembered beside the database."""
    notes = Notes()
    notes.tested = False
    world.fence("a", notes).acquire()
    assert notes.tested
    puts = []
    world.store.before = lambda key, made: puts.append(key)
    world.fence("a", notes).acquire()
    assert puts == [LEASE_KEY]


def test_an_attempt_that_lands_late(world: World) -> None:
    """However many attempts at the lease follow it: it was ours."""
    notes = Notes()
    fence = world.fence("a", notes)
    real, world.store.put = world.store.put, _lost  # type: ignore[method-assign]
    nonces = []
    for _ in range(8):
        with pytest.raises(StoreUnavailable):
            fence.acquire()
        nonces.append(notes.nonces()[-1])
        world.clock.advance(1.0)
    world.store.put = real  # type: ignore[method-assign]
    first = Lease(1, "a", 0, nonces[0], lease_s=LEASE_S)
    world.objects[LEASE_KEY] = Object(first.to_json(), world.clock.now_ms())
    fence.acquire()
    assert fence.holds()
    again = world.fence("a", notes)
    again.acquire()
    assert world.lease.nonce != first.nonce, "each time that it is taken it has another name"


def _lost(*_: Any, **__: Any) -> ObjectInfo:
    raise StoreUnavailable("it timed out", ambiguous=True)


def test_what_a_former_writer_can_still_acknowledge(world: World) -> None:
    """Nothing, if its lease was waited out and is ours yet; else nobody knows."""
    notes = Notes()
    first = world.fence("a", notes)
    first.acquire()
    assert not first.has_outlasted()  # there was nobody to wait for
    copy = world.fence("copy of a", notes)
    copy.acquire()
    assert not copy.has_outlasted()  # it knew the nonce, and did not wait
    copy.release()
    given = world.fence("b")
    given.acquire()
    assert not given.has_outlasted()  # it was given up, by a copy
    world.clock.advance(LEASE_S + 5)
    second = world.fence("c")
    second.acquire()
    assert second.has_outlasted()
    world.clock.advance(LEASE_S + 5)
    assert second.has_outlasted()
    world.clock.advance(LEASE_S + 5)
    world.fence("d").acquire()
    with pytest.raises(FencedError, match="taken over by d"):
        second.has_outlasted()


def test_off_sends_nothing(world: World) -> None:
    """fence: off makes no request at all."""
    world.store.away = True
    fence = world.fence("a", policy="off")
    fence.acquire()
    fence.renew()
    fence.release()
    assert (fence.works, fence.holds()) == (False, True)
    assert not world.objects


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"generation": "x", "owner": "", "expires_at": ""}',
        b'{"generation": 1, "expires_at": "2026-01-31T15:54:37Z", "lease_seconds": "x"}',
        b'{"generation": 1e999, "expires_at": "2026-01-31T15:54:37Z"}',
        b'{"generation": 1, "expires_at": 17}',
        b'{"generation": 1, "expires_at": "2026-01-31T15:54:37Z", "lease_seconds": NaN}',
    ],
)
def test_a_lease_that_cannot_be_read(world: World, body: bytes) -> None:
    """Somebody wrote it: it is respected for as long as Litestream's lease lasts, then replaced."""
    world.store.put(LEASE_KEY, body)
    with pytest.raises(FencedError, match="another writer"):
        world.fence("a").acquire()
    world.clock.advance(LEASE_S + 3)
    world.fence("a").acquire()
    assert world.lease.owner == "a"


def test_a_lease_of_litestream(world: World) -> None:
    """Its schema is read: the owner is named."""
    world.store.put(
        LEASE_KEY,
        b'{"generation":7,"owner":"litestream-host","expires_at":"2026-01-31T15:54:37.123456789Z"}',
    )
    with pytest.raises(FencedError, match="litestream-host"):
        world.fence("a").acquire()
    world.clock.advance(LEASE_S + 3)
    world.fence("a").acquire()
    assert world.lease.generation == 8
