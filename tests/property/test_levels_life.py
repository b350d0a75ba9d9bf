"""Years of a replica's life in virtual time, with the shipped modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from support.life import Life
from walship.replica.config.levels import LevelSettings
from walship.replica.errors import StoreError
from walship.replica.levels import KEPT_L0
from walship.replica.marks import Mark, put_mark, remove_mark

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S

YEARS = {
    "defaults": LevelSettings(),
    "one level": LevelSettings(intervals_s=(60.0,)),
    "eight levels": LevelSettings(
        intervals_s=(10.0, 20.0, 60.0, 300.0, 1800.0, HOUR_S, 2 * HOUR_S, 8 * HOUR_S)
    ),
    "long retention": LevelSettings(
        intervals_s=(60.0, HOUR_S), snapshot_interval_s=DAY_S, snapshot_retention_s=7 * DAY_S
    ),
    "short retention": LevelSettings(
        snapshot_interval_s=DAY_S, snapshot_retention_s=HOUR_S, l0_retention_s=60.0
    ),
}


def gap_s(life: Life) -> float:
    """Until the next commit: mostly seconds, sometimes days."""
    kind = life.rng.random()
    if kind < 0.60:
        return life.rng.uniform(0.1, 40.0)
    if kind < 0.92:
        return life.rng.uniform(60.0, 4 * HOUR_S)
    return life.rng.uniform(4 * HOUR_S, 3 * DAY_S)


@pytest.mark.slow
@pytest.mark.parametrize("name", YEARS)
def test_a_year(name: str, tmp_path: Path) -> None:
    """Commits, outages, crashes, restarts: at every stage all that should be there is."""
    life = Life(tmp_path, YEARS[name], seed=len(name))
    began = life.clock.monotonic()
    life.commit()
    stage = 0
    while life.clock.monotonic() < began + 365 * DAY_S:
        life.advance(gap_s(life))
        chance = life.rng.random()
        if chance < 0.01:
            life.outage(life.rng.uniform(10.0, 12 * HOUR_S))
        elif chance < 0.02:
            life.crash_after(life.rng.randint(1, 12))
        elif chance < 0.03:
            life.start()
        elif chance < 0.04:
            life.store.lost = 1
            life.step()
            life.store.lost = 0
        life.requests_left, kept = -1, life.requests_left
        life.commit()
        life.requests_left = kept
        stage += 1
        if stage % 50 == 0:
            life.assert_newest_is_there()
            life.assert_txids_are_there(samples=3)
            life.assert_times_are_there(samples=3)
    life.requests_left = -1
    life.advance(HOUR_S)
    life.commit()
    life.advance(life.settings.snapshot_retention_s + 2 * DAY_S)
    assert life.is_idle
    life.assert_few_objects()
    life.assert_txids_are_there(samples=50)
    assert life.restored > 200


def test_a_busy_day_keeps_few_objects(tmp_path: Path) -> None:
    """A commit every few seconds for two days, and restarts: what is merged goes in time."""
    settings = LevelSettings(
        intervals_s=(30.0, 300.0, HOUR_S),
        snapshot_interval_s=4 * HOUR_S,
        snapshot_retention_s=4 * HOUR_S,
    )
    life = Life(tmp_path, settings, seed=7)
    for _ in range(4000):
        life.commit()
        life.advance(life.rng.uniform(1.0, 20.0))
        if life.rng.random() < 0.01:
            life.start()
            life.step()
    life.commit()
    life.advance(31.0)
    life.assert_few_objects()
    life.assert_times_are_there(samples=30)
    life.assert_txids_are_there(samples=30)


def test_without_the_right_to_delete_everything_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, merging goes on, and an idle database is idle."""
    life = Life(tmp_path, LevelSettings(), seed=1)
    refused = 0

    def delete(keys: Sequence[str]) -> None:
        nonlocal refused
        refused += 1
        raise StoreError("delete: AccessDenied", code="AccessDenied")

    life.store.delete = delete  # type: ignore[method-assign]
    for _ in range(60):
        life.commit()
        life.advance(100.0)
    life.advance(4 * DAY_S)
    assert life.is_idle
    assert refused == 1
    assert "retention: false" in caplog.text
    assert [s.max_txid for s in life.listing() if s.level == 0] == list(range(1, 61))
    assert max(s.max_txid for s in life.listing() if s.level == 3) == 60
    life.assert_txids_are_there(samples=10)


def test_a_marked_state_stays(tmp_path: Path) -> None:
    """Exactly that state can be restored as long as the mark exists; then it goes with the rest."""
    life = Life(tmp_path, LevelSettings(), seed=5)
    marked = {}
    for number in range(400):
        life.commit()
        if number % 90 == 50:
            label = f"mark-{number}"
            marked[label] = len(life.states)
            put_mark(life.store, Mark(label, marked[label], life.clock.now_ms()))
        life.advance(life.rng.uniform(1.0, 20.0) if number % 100 else 2 * DAY_S)
    life.advance(4 * DAY_S)
    assert life.is_idle
    for txid in marked.values():
        life.assert_restores(txid)
    for label in marked:
        remove_mark(life.store, label)
    for _ in range(30):
        life.commit()
        life.advance(100.0)
    life.advance(4 * DAY_S)
    assert life.is_idle
    life.assert_few_objects()


def test_as_long_as_all_stays_in_level_0_nobody_looks(tmp_path: Path) -> None:
    """A database that was written to a few times is never listed, also after a restart."""
    life = Life(tmp_path, LevelSettings(), seed=1)
    for number in range(KEPT_L0):
        if number == 3:
            life.start()
        life.commit()
        assert life.is_idle
    life.commit()
    assert not life.is_idle


def test_an_idle_replica_is_left_alone(tmp_path: Path) -> None:
    """Once all is merged and aged there is not one request, for ever."""
    life = Life(tmp_path, LevelSettings(), seed=1)
    for _ in range(20):
        life.commit()
        life.advance(11.0)
    life.advance(4 * DAY_S)
    assert life.is_idle
    life.store.away = True
    life.advance(30 * DAY_S)
    life.step()
    assert life.is_idle
