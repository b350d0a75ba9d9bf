"""What is asked of stores is counted: each attempt, its time, its bytes, its failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.clock import FakeClock
from support.faulty import FaultyStore
from support.servers import S3Endpoint
from walship.replica.config.sources import parse_replica
from walship.replica.counts import BUCKETS_S, Operation, RequestCounts
from walship.replica.errors import ObjectNotFound, PreconditionFailed, StoreUnavailable
from walship.replica.host import Host
from walship.replica.store.base import ObjectStore
from walship.replica.store.counting import CountingStore
from walship.replica.store.local import LocalStore
from walship.replica.store.retrying import RetryingStore

MIB = 1024 * 1024


class Setup:
    """A counting store around a faulty one around a directory; each of its operations takes time.

    Args:
        script: faults of the first operations.
        seconds: how long every operation takes.
    """

    def __init__(self, root: Path, script: list[str] | None = None, seconds: float = 0.0) -> None:
        self.clock = FakeClock()
        self.faulty = FaultyStore(LocalStore(root, self.clock), script=script or [])
        for name in ("put", "get", "read", "head", "delete"):
            setattr(self.faulty, name, self._slow(getattr(self.faulty, name), seconds))
        self.counts = RequestCounts()
        self.store = CountingStore(self.faulty, "file", self.counts, self.clock)

    def _slow(self, method: Callable[..., object], seconds: float) -> Callable[..., object]:
        def slowed(*args: object, **keywords: object) -> object:
            self.clock.sleep(seconds)
            return method(*args, **keywords)

        return slowed

    def operation(self, name: str) -> Operation:
        """What was counted of an operation."""
        (found,) = (each for each in self.counts.operations() if each.operation == name)
        return found


def test_operations_bytes_and_time(tmp_path: Path) -> None:
    """Each operation is counted with what it transferred and how long it took."""
    setup = Setup(tmp_path, seconds=0.3)
    setup.store.put("a", b"12345")
    setup.store.put("b", b"123")
    setup.store.get("a", 1, 2)
    version = setup.store.read("a")
    assert version is not None
    assert setup.store.read("a", unless_etag=version.etag) is None
    setup.store.head("a")
    setup.store.delete(["a", "b"])
    counted = {each.operation: (each.attempts, each.n_bytes) for each in setup.counts.operations()}
    assert counted == {"PUT": (2, 8), "GET": (3, 7), "HEAD": (1, 0), "DELETE": (1, 0)}
    put = setup.operation("PUT")
    assert put.seconds == pytest.approx(0.6)
    assert put.durations[BUCKETS_S.index(0.5)] == 2
    assert sum(put.durations) == 2
    assert put.replica_type == "file"


def test_slower_than_every_class(tmp_path: Path) -> None:
    """What takes longer than the last bound is counted behind it; a bound belongs to its class."""
    setup = Setup(tmp_path, seconds=61.0)
    setup.store.put("a", b"")
    assert setup.operation("PUT").durations[-1] == 1
    counts = RequestCounts()
    counts.attempted("s3", "GET", BUCKETS_S[0], 0, None)
    assert counts.operations()[0].durations[0] == 1


def test_every_attempt_counts(tmp_path: Path) -> None:
    """Below a store that tries again, attempts that failed are there, with what failed."""
    setup = Setup(tmp_path, ["before", "after", "ok"])
    RetryingStore(setup.store, setup.clock).put("a", b"12345")
    put = setup.operation("PUT")
    assert (put.attempts, put.n_bytes) == (3, 5)
    assert put.errors == {"StoreUnavailable": 2}


def test_answers_are_no_failures(tmp_path: Path) -> None:
    """That an object is missing, or there already, is what a working store says."""
    setup = Setup(tmp_path)
    with pytest.raises(ObjectNotFound):
        setup.store.get("a")
    setup.store.put("a", b"1")
    with pytest.raises(PreconditionFailed):
        setup.store.put("a", b"2", if_absent=True)
    assert [each.errors for each in setup.counts.operations()] == [{}, {}]
    assert [each.attempts for each in setup.counts.operations()] == [1, 2]


def test_a_listing_is_one_operation_however_it_ends(tmp_path: Path) -> None:
    """A listing counts once: read to its end, given up, or failed; the reader's time is its own."""
    setup = Setup(tmp_path)
    for key in ("0000/a", "0000/b"):
        setup.store.put(key, b"")
    for _ in setup.store.list("0000/"):
        setup.clock.sleep(5.0)
    listing = setup.store.list("0000/")
    assert next(listing).key == "0000/a"
    listing.close()  # type: ignore[attr-defined]
    assert (setup.operation("LIST").attempts, setup.operation("LIST").seconds) == (2, 0.0)
    setup.faulty.before = 1.0
    with pytest.raises(StoreUnavailable):
        list(setup.store.list("0000/"))
    assert setup.operation("LIST").errors == {"StoreUnavailable": 1}


def test_requests_to_s3_are_counted_as_they_are_sent(minio_server: S3Endpoint) -> None:
    """Parts of an upload and pages of a listing are requests of their own, under S3's names."""
    host = Host()
    replica = {**minio_server.replica(minio_server.make_bucket(), "app"), "part-size": "5MiB"}
    store: ObjectStore = host.open_store(parse_replica(replica, environ={}).store)
    store.put("0000/large", bytes(12 * MIB))
    store.put("0000/small", b"x")
    with pytest.raises(ObjectNotFound):
        store.head("0000/none")
    list(store.list("0000/"))
    store.delete(["0000/small", "0000/large"])
    store.close()
    assert host.requests.requests() == {
        "CompleteMultipartUpload": 1,
        "CreateMultipartUpload": 1,
        "DeleteObjects": 1,
        "HeadObject": 1,
        "ListObjectsV2": 1,
        "PutObject": 1,
        "UploadPart": 3,
    }
    counted = {each.operation: each.attempts for each in host.requests.operations()}
    assert counted == {"PUT": 2, "HEAD": 1, "LIST": 1, "DELETE": 1}
    assert {each.replica_type for each in host.requests.operations()} == {"s3"}


def test_nothing_is_counted_in_a_forked_child_yet() -> None:
    """A child begins at zero, even if somebody was counting at the moment of the fork."""
    counts = RequestCounts()
    counts.sent("PutObject")
    counts.attempted("s3", "PUT", 0.1, 1, None)
    counts._lock.acquire()
    counts.forget()
    assert (counts.requests(), counts.operations()) == ({}, ())


def test_what_another_process_counted(tmp_path: Path) -> None:
    """It is added, failures and durations too."""
    setup = Setup(tmp_path, ["before", "ok"], seconds=0.3)
    with pytest.raises(StoreUnavailable):
        setup.store.put("a", b"12345")
    setup.store.put("a", b"12345")
    once = setup.operation("PUT")
    assert once.errors
    setup.counts.add([once], {"PutObject": 2})
    setup.counts.add([], {"PutObject": 1})
    twice = setup.operation("PUT")
    assert (twice.attempts, twice.n_bytes) == (2 * once.attempts, 2 * once.n_bytes)
    assert twice.seconds == pytest.approx(2 * once.seconds)
    assert twice.durations == tuple(2 * n for n in once.durations)
    assert twice.errors == {code: 2 * n for code, n in once.errors.items()}
    assert setup.counts.requests() == {"PutObject": 3}
