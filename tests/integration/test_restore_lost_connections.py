"""Connections to a real server that break off in the middle of an object."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from support.clock import FakeClock
from support.cutting import CuttingProxy, cutting_proxy
from support.databases import assert_same_bytes
from support.replicas import local_store, write_pages
from support.servers import S3Endpoint
from walship.replica.clock import SystemClock
from walship.replica.config.sources import parse_replica
from walship.replica.errors import ObjectNotFound, RestoreError, StoreUnavailable
from walship.replica.restore import restore
from walship.replica.store.base import ObjectStore, segment_key
from walship.replica.store.opening import open_store
from walship.replica.store.retrying import RetryingStore

KEY = "0009/0000000000000001-0000000000000001.ltx"
N_PAGES = 40  # of 65,536 incompressible bytes


@pytest.fixture
def proxy(minio_server: S3Endpoint) -> Iterator[CuttingProxy]:
    with cutting_proxy(minio_server.url) as running:
        yield running


class Bucket:
    """A replica in a new bucket: straight, and through the proxy."""

    def __init__(self, server: S3Endpoint, proxy: CuttingProxy) -> None:
        bucket = server.make_bucket()
        facts = server.replica(bucket, "db")
        self.straight = self._open(facts)
        self.through = self._open({**facts, "endpoint": proxy.url})

    @staticmethod
    def _open(facts: dict[str, object]) -> ObjectStore:
        return open_store(parse_replica(facts).store, FakeClock())

    def close(self) -> None:
        self.straight.close()
        self.through.close()


@pytest.fixture
def bucket(minio_server: S3Endpoint, proxy: CuttingProxy) -> Iterator[Bucket]:
    with closing(Bucket(minio_server, proxy)) as made:
        yield made


def gets(proxy: CuttingProxy) -> list[bytes]:
    return [
        request for request in proxy.requests if request.startswith(b"GET") and b".ltx" in request
    ]


def test_the_rest_is_asked_for_with_the_tag(bucket: Bucket, proxy: CuttingProxy) -> None:
    """After each break only what is missing is read again, from the same version."""
    content = random.Random(1).randbytes(2_000_000)
    stored = bucket.straight.put(KEY, content)
    proxy.after_bytes, proxy.cuts = 300_000, 3
    assert bucket.through.get(KEY, 1000, 1_900_000) == content[1000:1_901_000]
    first, *rest = gets(proxy)
    assert len(rest) == 3
    assert b"if-match" not in first.lower()
    assert stored.etag is not None
    assert all(f'if-match: "{stored.etag}"'.encode() in request.lower() for request in rest)
    assert proxy.n_bytes < 2_100_000


def test_other_versions_are_not_mixed(bucket: Bucket, proxy: CuttingProxy) -> None:
    """An object that is replaced after the break is read from its beginning."""
    old, new = (random.Random(seed).randbytes(1_000_000) for seed in (1, 2))
    bucket.straight.put(KEY, old)
    proxy.after_bytes, proxy.cuts = 300_000, 1
    proxy.on_cut = lambda: bucket.straight.put(KEY, new)
    with pytest.raises(StoreUnavailable, match="replaced while it was read"):
        bucket.through.get(KEY)
    bucket.straight.put(KEY, old)
    proxy.cuts = 1
    assert RetryingStore(bucket.through, FakeClock()).get(KEY) == new


def test_a_connection_that_always_breaks(bucket: Bucket, proxy: CuttingProxy) -> None:
    """Every answer is cut: a few attempts, then an error, never a part of the content."""
    bucket.straight.put(KEY, bytes(3_000_000))
    proxy.after_bytes, proxy.cuts = 100_000, 10**6
    with pytest.raises(StoreUnavailable):
        bucket.through.get(KEY)
    assert len(gets(proxy)) == 5


def test_a_restore_survives_breaks(bucket: Bucket, proxy: CuttingProxy, tmp_path: Path) -> None:
    """A restore over a bad connection makes the same file, and fetches hardly more."""
    root = tmp_path / "replica"
    write_pages(root, 9, 1, 1, N_PAGES, range(1, N_PAGES + 1), page_size=65536, compressible=False)
    for txid in range(2, 6):
        write_pages(
            root, 0, txid, txid, N_PAGES, [1, 8 * txid], page_size=65536, compressible=False
        )
    local = local_store(root)
    size = 0
    for level in (0, 9):
        for info in local.list(local.level_prefix(level)):
            content = local.get(info.key)
            size += len(content)
            txids = [int(word, 16) for word in Path(info.key).stem.split("-")]
            bucket.straight.put(segment_key(bucket.straight, level, *txids), content)
    restore(local, tmp_path / "expected.db", clock=SystemClock())
    proxy.after_bytes, proxy.cuts = 60_000, 8
    store = RetryingStore(bucket.through, FakeClock())
    result = restore(store, tmp_path / "out.db", clock=SystemClock())
    assert_same_bytes(tmp_path / "out.db", tmp_path / "expected.db")
    assert proxy.cuts == 0
    assert result.bytes_fetched == size
    assert proxy.n_bytes < 1.1 * size


def test_a_segment_that_is_compacted_during_a_restore(
    bucket: Bucket, proxy: CuttingProxy, tmp_path: Path
) -> None:
    """A small segment that goes while another is read is found in the level above; no failure."""
    root = tmp_path / "replica"
    write_pages(root, 9, 1, 1, N_PAGES, range(1, N_PAGES + 1), page_size=65536, compressible=False)
    write_pages(root, 0, 2, 2, N_PAGES, [1, 3], page_size=65536, compressible=False)
    write_pages(root, 1, 2, 2, N_PAGES, [1, 3], page_size=65536, compressible=False)
    names = {
        level: (segment_key(bucket.straight, level, low, high), local_store(root).get(key))
        for level, low, high, key in (
            (9, 1, 1, "ltx/9/0000000000000001-0000000000000001.ltx"),
            (0, 2, 2, "ltx/0/0000000000000002-0000000000000002.ltx"),
            (1, 2, 2, "ltx/1/0000000000000002-0000000000000002.ltx"),
        )
    }
    for level in (9, 0):
        bucket.straight.put(*names[level])

    def compact() -> None:
        bucket.straight.put(*names[1])
        bucket.straight.delete([names[0][0]])

    # The newest segment is the first to be read: it is gone when the rest of it is asked for.
    proxy.after_bytes, proxy.cuts, proxy.on_cut = 60_000, 1, compact
    store = RetryingStore(bucket.through, FakeClock())
    result = restore(store, tmp_path / "out.db", clock=SystemClock(), parallelism=1)
    assert result.source.plan is not None
    assert [segment.level for segment in result.source.plan.segments] == [9, 1]
    restore(local_store(root), tmp_path / "expected.db", clock=SystemClock())
    assert_same_bytes(tmp_path / "out.db", tmp_path / "expected.db")


def test_plans_have_an_end(bucket: Bucket, proxy: CuttingProxy, tmp_path: Path) -> None:
    """A listing that changes all the time, of objects that are gone, ends in an error."""
    root = tmp_path / "replica"
    write_pages(root, 9, 1, 1, 2, [1, 2])
    content = local_store(root).get("ltx/9/0000000000000001-0000000000000001.ltx")
    bucket.straight.put(KEY, content)
    n_plans = 0

    class Vanishing(RetryingStore):
        def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            nonlocal n_plans
            n_plans += 1
            bucket.straight.put(segment_key(bucket.straight, 9, 1, 1 + n_plans), content)
            raise ObjectNotFound(f"no object {key}")

    with pytest.raises(RestoreError, match="listed but cannot be read"):
        restore(Vanishing(bucket.through, FakeClock()), tmp_path / "out.db", clock=SystemClock())
    assert n_plans == 5
    assert not (tmp_path / "out.db").exists()
