"""Killed at any moment, again and again, a process loses nothing, and goes on where it stopped."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from support.databases import Database
from support.history import History
from support.killing import run_writer

_BALLAST_BYTES = 600_000


def _kill_again_and_again(
    database: Database, seed: int, rounds: int, put_delay_s: float, **settings: object
) -> None:
    """Each round: write, be killed, restore; then write on, and compare everything."""
    rng = random.Random(seed)
    history = History(seed, _BALLAST_BYTES)
    with database.opened() as connection:
        history.apply(connection, 0)
        database.sync()
    sent = set(database.segments())
    acknowledged = synced = 1
    kills = 0
    for _ in range(rounds):
        report = run_writer(
            database.path,
            database.replica,
            seed=seed,
            ballast_bytes=_BALLAST_BYTES,
            steps=rng.choice((20, 100, 300)),
            noise=rng.randrange(1, 1 << 30),
            put_delay_s=put_delay_s,
            rewrite_bytes=None,
            kill_after_s=rng.random() * 0.5,
            settings={"autocheckpoint": rng.choice((5, 60, 1000)), **settings},
        )
        assert report.errors == ""
        assert report.killed or report.finished
        kills += report.killed
        acknowledged = max(acknowledged, report.committed)
        synced = max(synced, report.synced)
        restored = database.restore()
        assert synced <= history.length_of(restored) <= acknowledged + 1
        restored.unlink()
    assert kills
    with database.opened() as connection:
        n = history.length(connection)
        assert acknowledged <= n <= acknowledged + 1
        history.apply(connection, n)
        database.sync()
    database.assert_replica_equals_file()
    assert history.length_of(database.restore()) == n + 1
    new = [size for name, size in database.segments().items() if name not in sent]
    assert max(new) < _BALLAST_BYTES / 2, "a full copy was sent again"


@pytest.mark.parametrize("seed", range(4))
def test_random_kills(seed: int, tmp_path: Path) -> None:
    """Restored after each kill: a prefix with all that was synced; at last nothing is missing."""
    _kill_again_and_again(Database(tmp_path), seed, rounds=4, put_delay_s=0.0)


@pytest.mark.parametrize("seed", range(4))
def test_random_kills_with_a_slow_store(seed: int, tmp_path: Path) -> None:
    """The same with several PUTs in flight, which may have arrived although nobody saw it."""
    _kill_again_and_again(Database(tmp_path), seed, rounds=4, put_delay_s=0.15)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 120))
def test_many_random_kills(seed: int, tmp_path: Path) -> None:
    """Many more moments, with page sizes and segment limits mixed."""
    rng = random.Random(seed)
    page_size = rng.choice((512, 1024, 4096, 16384))
    limit = rng.choice(("16KB", "64MB", "0"))
    database = Database(tmp_path, page_size=page_size)
    _kill_again_and_again(database, seed, 6, rng.choice((0.0, 0.05, 0.3)), max_sync_wal_bytes=limit)
