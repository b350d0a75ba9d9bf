"""Each object of a replica with levels is damaged in turn, in every way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from support.life import Life, State
from support.memory import MemoryStore, Object
from walship.replica.clock import SystemClock
from walship.replica.config.levels import LevelSettings
from walship.replica.errors import ReplicaError
from walship.replica.listing import list_replica
from walship.replica.restore import restore

SETTINGS = LevelSettings(
    intervals_s=(10.0, 60.0),
    snapshot_interval_s=300.0,
    snapshot_retention_s=7200.0,
    l0_retention_s=30.0,
)

Objects = Mapping[str, Object]
Damage = Callable[[Objects, str], Object | None]


def flipped(at: Callable[[int], int]) -> Damage:
    """One bit is another one."""

    def damage(objects: Objects, key: str) -> Object:
        body = bytearray(objects[key].body)
        body[at(len(body))] ^= 0x10
        return replace(objects[key], body=bytes(body))

    return damage


def swapped(step: int) -> Damage:
    """It holds what another one should."""

    def damage(objects: Objects, key: str) -> Object:
        keys = sorted(objects)
        other = keys[(keys.index(key) + step) % len(keys)]
        return replace(objects[key], body=objects[other].body)

    return damage


def cut(keep: Callable[[int], int]) -> Damage:
    def damage(objects: Objects, key: str) -> Object:
        body = objects[key].body
        return replace(objects[key], body=body[: keep(len(body))])

    return damage


DAMAGES: dict[str, Damage] = {
    "cut in the middle": cut(lambda size: size // 2),
    "last byte lost": cut(lambda size: size - 1),
    "header only": cut(lambda size: 100),
    "emptied": cut(lambda size: 0),
    "bit in the header": flipped(lambda size: 20),
    "bit in a page": flipped(lambda size: 100 + (size - 100) // 3),
    "bit in the index": flipped(lambda size: size - 30),
    "bit in the checksum": flipped(lambda size: size - 1),
    "missing": lambda objects, key: None,
    "its neighbour": swapped(1),
    "another": swapped(7),
}


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """Objects in levels 0, 1, 2 and 9, some of which hold the same."""
    made = Life(tmp_path_factory.mktemp("life"), SETTINGS, seed=3)
    for _ in range(75):
        made.commit()
        made.advance(made.rng.uniform(1.0, 9.0))
    assert {segment.level for segment in made.listing()} == {0, 1, 2, 9}
    return made


def restored(objects: dict[str, Object], directory: Path, txid: int | None) -> tuple[int, bytes]:
    output = directory / "out" / "app.db"
    output.parent.mkdir(exist_ok=True)
    try:
        result = restore(MemoryStore(objects), output, clock=SystemClock(), txid=txid)
    except ReplicaError as error:
        assert list(output.parent.iterdir()) == [], "something was left behind"
        assert str(error)
        assert "\n" not in str(error)
        raise
    found = output.read_bytes()
    output.unlink()
    assert result.txid is not None
    return result.txid, found


def pages(state: State) -> bytes:
    return b"".join(state.pages)


def in_level_1_alone(life: Life) -> int:
    """A TXID that only a segment of level 1 ends with."""
    listing = life.listing()
    others = {segment.max_txid for segment in listing if segment.level != 1}
    return max({segment.max_txid for segment in listing if segment.level == 1} - others)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_restore_is_right_or_refused(name: str, life: Life, tmp_path: Path) -> None:
    """An older sound database or one clear error: for the newest state and for one in between."""
    refused = 0
    between = in_level_1_alone(life)
    for key in sorted(life.objects):
        objects = dict(life.objects)
        made = DAMAGES[name](life.objects, key)
        if made is None:
            del objects[key]
        else:
            objects[key] = made
        for txid in (None, between, len(life.states) - 1):
            try:
                reached, found = restored(objects, tmp_path, txid)
            except ReplicaError:
                refused += 1
                continue
            assert found == pages(life.states[reached - 1]), f"{key}, TXID {reached}"
            assert txid is None or reached == txid
    assert refused  # the damage is noticed somewhere


@pytest.mark.parametrize(
    "name", ["cut in the middle", "emptied", "bit in a page", "missing", "its neighbour"]
)
def test_merging_makes_nothing_worse(name: str, life: Life, tmp_path: Path) -> None:
    """A process that comes to lead a damaged replica merges what it can, and what could be restored
    before still can be; what it makes of the rest is never wrong."""
    for key in sorted(life.objects)[::2]:
        damaged = Life(tmp_path, SETTINGS, seed=4)
        damaged.clock.advance(life.clock.monotonic() - damaged.clock.monotonic())
        damaged.objects.update(life.objects)
        damaged.states = list(life.states)
        made = DAMAGES[name](life.objects, key)
        if made is None:
            del damaged.objects[key]
        else:
            damaged.objects[key] = made
        head = life.states[-1].txid
        before = _reached(damaged, tmp_path)
        for _ in range(12):
            damaged.commit()
            damaged.advance(15.0)
        after = _reached(damaged, tmp_path)
        assert after >= before, f"{key}: TXID {after} instead of {before}"
        assert before != head or after == head + 12, f"{key}: what is new cannot be reached"


def test_damage_is_said_once_and_seldom_tried_again(
    life: Life, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its level waits; the others go on, and nothing is read again at each interval."""
    damaged = Life(tmp_path, SETTINGS, seed=4)
    damaged.clock.advance(life.clock.monotonic() - damaged.clock.monotonic())
    damaged.objects.update(life.objects)
    damaged.states = list(life.states)
    newest = max(key for key in life.objects if key.startswith(life.store.level_prefix(0)))
    damaged.objects[newest] = DAMAGES["bit in a page"](life.objects, newest) or life.objects[newest]
    reads = 0
    get = damaged.store.get

    def counted(key: str, start: int = 0, length: int | None = None) -> bytes:
        nonlocal reads
        reads += key == newest
        return get(key, start, length)

    damaged.store.get = counted  # type: ignore[method-assign]
    for _ in range(400):
        damaged.commit()
        damaged.advance(10.0)
    said = [r.getMessage() for r in caplog.records if "into level 1" in r.getMessage()]
    assert len(said) == 1
    assert newest in said[0]
    # Level 1 and the snapshot: after 30 s, 60 s, ... of 4000 s, which hold 400 intervals.
    assert 2 <= reads <= 40
    expected = {s.max_txid for s in damaged.listing() if s.level == 0}
    assert set(range(life.states[-1].txid, len(damaged.states) + 1)) <= expected


def _reached(life: Life, directory: Path) -> int:
    """The newest TXID that a restore leads to; 0 without any."""
    listing = list_replica(life.store)
    for txid in sorted({segment.max_txid for segment in listing}, reverse=True)[:40]:
        try:
            reached, found = restored(dict(life.objects), directory, txid)
        except ReplicaError:
            continue
        assert found == pages(life.states[reached - 1])
        return reached
    return 0
