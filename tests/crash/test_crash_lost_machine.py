"""A machine that is lost takes no commit with it that was acknowledged as durable."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.losing import Tally, lose_machines
from support.servers import S3Endpoint


def _assert_nothing_lost(tally: Tally, kills: int) -> None:
    assert tally.faults == []
    assert tally.missing == 0
    assert tally.kills >= kills
    assert tally.acknowledged >= kills // 2


@pytest.mark.slow
def test_lost_machines(s3_server: S3Endpoint, tmp_path: Path) -> None:
    """Killed while commits wait, and restored: every acknowledged row is there (`make soak`)."""
    bucket = s3_server.make_bucket()
    tally = lose_machines(lambda game: s3_server.replica(bucket, f"game-{game}"), tmp_path, 25)
    _assert_nothing_lost(tally, 25)


def test_lost_machines_with_the_replica_in_a_directory(tmp_path: Path) -> None:
    """The same with a directory, which another disk or machine would hold."""
    tally = lose_machines(
        lambda game: {"path": str(tmp_path / f"replica-{game}")}, tmp_path, 10, seed=100
    )
    _assert_nothing_lost(tally, 10)
