"""What a writer had in flight when it and its disk died is left out by a restore."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import walship
from support.clock import FakeClock
from walship.replica.errors import GapError
from walship.replica.restore import restore
from walship.replica.store.base import SHA256_METADATA, Body, ObjectInfo, segment_key
from walship.replica.store.local import LocalStore


class StoreWithMetadata(LocalStore):
    """A directory that keeps user metadata, as an object store does, for as long as it lives."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, FakeClock())
        self.kept: dict[str, Mapping[str, str]] = {}

    def put(
        self,
        key: str,
        body: Body,
        *,
        timestamp_ms: int | None = None,
        metadata: Mapping[str, str] | None = None,
        if_absent: bool = False,
    ) -> ObjectInfo:
        info = super().put(key, body, timestamp_ms=timestamp_ms, if_absent=if_absent)
        self.kept[key] = dict(metadata or {})
        return info

    def head(self, key: str) -> ObjectInfo:
        return replace(super().head(key), metadata=self.kept.get(key, {}))


def replica_with_segments(tmp_path: Path, count: int, *, marked: bool) -> StoreWithMetadata:
    """A replica of ``count`` level-0 segments, with walship's mark on each or on none."""
    source = tmp_path / "source"
    with closing(walship.connect(tmp_path / "app.db", source, sync_interval=0)) as db:
        replication = walship.replication(db)
        db.execute("create table t(n)")
        while replication.sync(30) < count:
            db.execute("insert into t values(1)")
    store = StoreWithMetadata(tmp_path / "replica")
    metadata = {SHA256_METADATA: "0" * 64} if marked else None
    for info in LocalStore(source, FakeClock()).list("ltx/0/"):
        store.put(info.key, source / info.key, metadata=metadata)
    return store


def test_dead_uploads_behind_a_hole_are_left_out(tmp_path: Path) -> None:
    """A hole with only walship's own last uploads behind it: restore to before it, and say so."""
    store = replica_with_segments(tmp_path, 7, marked=True)
    store.delete([segment_key(store, 0, 5, 5)])
    result = restore(store, tmp_path / "out.db", clock=FakeClock())
    assert result.txid == 4
    assert "0000000000000005 is missing and 2 segment(s)" in result.warnings[0]


def test_a_hole_in_another_writers_replica_is_an_error(tmp_path: Path) -> None:
    """Litestream uploads one after the other: a hole in its replica is damage."""
    store = replica_with_segments(tmp_path, 7, marked=False)
    store.delete([segment_key(store, 0, 5, 5)])
    with pytest.raises(GapError):
        restore(store, tmp_path / "out.db", clock=FakeClock())
    assert not (tmp_path / "out.db").exists()


def test_a_hole_far_from_the_end_is_an_error(tmp_path: Path) -> None:
    """More than eight TXIDs from the newest back to the hole cannot have been in flight."""
    store = replica_with_segments(tmp_path, 12, marked=True)
    store.delete([segment_key(store, 0, 3, 3)])
    with pytest.raises(GapError):
        restore(store, tmp_path / "out.db", clock=FakeClock())
