"""The application under test, in a process of its own.

    python worker.py JOB      (a JSON object, see `Worker` in harness.py)

It prepares, prints one line of JSON, waits for a line on its standard input, does its task and
prints the result as one line of JSON.  ``contestant`` decides how databases are opened: through
walship, or by plain apsw (with Litestream in another process or without).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import apsw
from harness import WALSHIP, high_water_kb, percentile

Job = dict[str, Any]

#: Commits carry their number in this form, so that it can be found in the pages of a segment.
MARK = b"bench-seq-%012d"
PAYLOAD_BYTES = 120


def open_database(job: Job, path: str | None = None, replica: Job | None = None) -> apsw.Connection:
    """A connection as this contestant's application would make it."""
    name = path or job["path"]
    if job["contestant"] == WALSHIP:
        import walship

        replica = replica or job.get("replica")
        db: apsw.Connection = walship.connect(name, replica=replica, **job.get("settings", {}))
    elif job["contestant"] == "pass-through VFS":
        db = apsw.Connection(name, vfs=_pass_through().vfs_name)
        db.set_busy_timeout(5000)
        db.pragma("journal_mode", "wal")
    else:
        db = apsw.Connection(name)
        db.set_busy_timeout(5000)
        db.pragma("journal_mode", "wal")
    db.pragma("synchronous", job.get("synchronous", "NORMAL"))
    if "autocheckpoint" in job:
        db.wal_autocheckpoint(job["autocheckpoint"])
    return db


class _PassThrough(apsw.VFS):
    """The least a VFS in Python can be: its main file does nothing but forward."""

    vfs_name = "bench-pass-through"

    def __init__(self) -> None:
        super().__init__(self.vfs_name, "unix")

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _PassThroughFile("unix", name, flags)


class _PassThroughFile(apsw.VFSFile):
    def xFileControl(self, op: int, ptr: int) -> bool:
        return super().xFileControl(op, ptr)


_registered: list[_PassThrough] = []


def _pass_through() -> _PassThrough:
    if not _registered:
        _registered.append(_PassThrough())
    return _registered[0]


def sync(job: Job, db: apsw.Connection, timeout: float = 300.0) -> None:
    """Wait until the replica has everything, where this process is who replicates."""
    if job["contestant"] == WALSHIP:
        import walship

        walship.replication(db).sync(timeout)


def handshake(**facts: Any) -> None:
    """Say that the preparation is done and wait for the start."""
    print(json.dumps(facts), flush=True)
    if not sys.stdin.readline():
        sys.exit(3)  # whoever started this is gone


# --- commits --------------------------------------------------------------------------------------


def commits(job: Job) -> Job:
    """Single-row commits as fast as they go, in one or several threads."""
    db = open_database(job)
    db.execute("create table t(id integer primary key, a integer, b blob)")
    db.execute("begin")
    for number in range(2000):
        db.execute("insert into t(a, b) values(?, ?)", (number, os.urandom(PAYLOAD_BYTES)))
    db.execute("commit")
    sync(job, db)
    handshake()
    n_threads = job.get("threads", 1)
    seconds = job["seconds"]
    gc.collect()
    with ThreadPoolExecutor(n_threads) as pool:
        barrier = threading.Barrier(n_threads)

        def one(_: int) -> list[float]:
            own = db if n_threads == 1 else open_database(job)
            barrier.wait()
            found = _commit_for(own, seconds)
            if own is not db:
                own.close()
            return found

        started = time.perf_counter()
        times = [value for part in pool.map(one, range(n_threads)) for value in part]
        elapsed = time.perf_counter() - started
    wal_bytes = os.stat(job["path"] + "-wal").st_size
    sync(job, db)
    peak_kb = high_water_kb()
    times.sort()
    db.close()
    return {
        "per_s": len(times) / elapsed,
        "p50_us": percentile(times, 0.5) * 1e6,
        "p99_us": percentile(times, 0.99) * 1e6,
        "p999_us": percentile(times, 0.999) * 1e6,
        "max_ms": times[-1] * 1e3,
        "n": len(times),
        "wal_mb": wal_bytes / 1e6,
        "peak_mb": peak_kb / 1024,
    }


def _commit_for(db: apsw.Connection, seconds: float) -> list[float]:
    execute = db.execute
    clock = time.perf_counter
    payload = os.urandom(PAYLOAD_BYTES)
    times = []
    number = 0
    before = clock()
    end = before + seconds
    while before < end:
        execute("insert into t(a, b) values(?, ?)", (number, payload))
        after = clock()
        times.append(after - before)
        before = after
        number += 1
    return times


# --- reads ----------------------------------------------------------------------------------------


def reads(job: Job) -> Job:
    """Point reads and a scan of a database that was made before."""
    db = open_database(job)
    rows = job["rows"]
    sync(job, db)
    handshake()
    seconds = job["seconds"]
    db.pragma("cache_size", -400_000)
    for _ in db.execute("select * from t"):
        pass
    found: Job = {"own": _reads_for(db, rows, seconds)}
    db.execute("begin")
    found["one"] = _reads_for(db, rows, seconds)
    db.execute("commit")
    keeper = db  # the last close would be more than a close
    db = open_database(job)
    db.pragma("cache_size", -2000)
    db.execute("begin")
    found["small_cache"] = _reads_for(db, rows, seconds)
    db.execute("commit")
    db.close()
    scans: list[float] = []
    end = time.perf_counter() + seconds
    while not scans or time.perf_counter() < end:
        db = open_database(job)
        before = time.perf_counter()
        db.execute("select sum(length(b)) from t").fetchall()
        scans.append(time.perf_counter() - before)
        db.close()
    keeper.close()
    found["scan"] = len(scans) / sum(scans)
    return found


def _reads_for(db: apsw.Connection, rows: int, seconds: float) -> float:
    rng = random.Random(1)
    ids = [rng.randrange(1, rows + 1) for _ in range(20_000)]
    execute = db.execute
    clock = time.perf_counter
    n = 0
    started = clock()
    end = started + seconds
    while True:
        for wanted in ids[n % 20_000 : n % 20_000 + 200]:
            execute("select b from t where id = ?", (wanted,)).fetchall()
        n += 200
        if (now := clock()) >= end:
            return n / (now - started)


# --- lag ------------------------------------------------------------------------------------------


def paced(job: Job) -> Job:
    """Commits at a steady rate, each with its number; when each was done (CLOCK_MONOTONIC)."""
    db = open_database(job)
    db.execute("create table seq(id integer primary key, mark blob)")
    db.execute("create table t(id integer primary key, a integer, b blob)")
    db.execute("insert into seq values(1, ?)", (MARK % 0,))
    sync(job, db)
    handshake()
    step = 1 / job["rate"]
    payload = os.urandom(PAYLOAD_BYTES)
    times = []
    due = time.monotonic()
    for number in range(1, job["commits"] + 1):
        due += step
        time.sleep(max(0.0, due - time.monotonic()))
        db.execute("begin")
        db.execute("insert into t(a, b) values(?, ?)", (number, payload))
        db.execute("update seq set mark = ? where id = 1", (MARK % number,))
        db.execute("commit")
        times.append(time.monotonic())
    sync(job, db)
    print(json.dumps({"times": times}), flush=True)
    sys.stdin.readline()  # whoever measures Litestream waits for its last object first
    db.close()
    return {"peak_mb": high_water_kb() / 1024}


def single(job: Job) -> Job:
    """One commit at a time into one of several databases that were idle before."""
    databases = []
    for path, replica in job["databases"].items():
        db = open_database(job, path, replica)
        db.execute("create table seq(id integer primary key, mark blob)")
        db.execute("insert into seq values(1, ?)", (MARK % 0,))
        sync(job, db)
        databases.append(db)
    handshake()
    times: list[list[float]] = [[] for _ in databases]
    rng = random.Random(job["seed"])
    step = job["idle_s"] / len(databases)
    due = time.monotonic() + job["idle_s"]
    for number in range(1, job["commits"] + 1):
        for index, db in enumerate(databases):
            due += step
            # Somewhere in the step, or the commits would always meet a poller at the same moment.
            time.sleep(max(0.0, due - time.monotonic()) + rng.random() * step / 2)
            db.execute("update seq set mark = ? where id = 1", (MARK % number,))
            times[index].append(time.monotonic())
    for db in databases:
        sync(job, db)
    print(json.dumps({"times": times}), flush=True)
    sys.stdin.readline()
    for db in databases:
        db.close()
    return {}


def idle(job: Job) -> Job:
    """A database with something in it, and then nothing happens."""
    db = open_database(job)
    db.execute("create table t(id integer primary key, b blob)")
    db.execute("insert into t(b) values(?)", (os.urandom(PAYLOAD_BYTES),))
    sync(job, db)
    handshake()
    sys.stdin.readline()
    db.close()
    return {}


# --- durable --------------------------------------------------------------------------------------


def durable(job: Job) -> Job:
    """Writers that each wait for the replica before their next commit; not counting a warm-up."""
    db = open_database(job)
    db.execute("create table if not exists t(id integer primary key, a integer, b blob)")
    sync(job, db)
    n_writers = job["writers"]
    payload = os.urandom(PAYLOAD_BYTES)
    start = threading.Event()
    found: list[list[tuple[float, float]]] = [[] for _ in range(n_writers)]

    def write(done: list[tuple[float, float]]) -> None:
        own = open_database({**job, "settings": {"durability": "replica"}})
        own.set_busy_timeout(30_000)
        own.execute("select count(*) from t").fetchall()
        opened.wait()
        start.wait()
        clock = time.perf_counter
        before = clock()
        while before < end:
            own.execute("insert into t(a, b) values(?, ?)", (len(done), payload))
            after = clock()
            done.append((before, after))
            before = after
        own.close()

    opened = threading.Barrier(n_writers + 1)
    threads = [threading.Thread(target=write, args=(done,)) for done in found]
    for thread in threads:
        thread.start()
    opened.wait()
    handshake()
    begin = time.perf_counter() + job["warm_up_s"]
    end = begin + job["seconds"]
    cpu = time.process_time()
    start.set()
    for thread in threads:
        thread.join()
    cpu = time.process_time() - cpu
    counted = sorted(t1 - t0 for done in found for t0, t1 in done if begin <= t1 <= end)
    if not counted:
        raise RuntimeError("no commit became durable")
    n_all = sum(map(len, found))
    db.close()
    return {
        "per_s": len(counted) / job["seconds"],
        "p50_ms": percentile(counted, 0.5) * 1e3,
        "p99_ms": percentile(counted, 0.99) * 1e3,
        "cpu_us": cpu / n_all * 1e6,
        "n": len(counted),
    }


# --- loss -----------------------------------------------------------------------------------------


def lose(job: Job) -> Job:
    """Numbered commits in several databases until killed, each written down when it was done.

    With a pause, a last commit follows it in each database, and this process kills itself.
    """
    databases = []
    for path, replica in job["databases"].items():
        db = open_database(job, path, replica)
        db.execute("create table t(a integer primary key, b blob)")
        sync(job, db)
        databases.append(db)
    notes = os.open(job["notes"], os.O_WRONLY | os.O_APPEND)
    payload = os.urandom(PAYLOAD_BYTES)

    def commit(index: int, number: int) -> None:
        databases[index].execute("insert into t values(?, ?)", (number, payload))
        os.write(notes, b"%d %d %d\n" % (index, number, time.monotonic_ns()))

    handshake()
    pause_s = job.get("pause_s")
    step = 1 / job["rate"] / len(databases)
    due = time.monotonic()
    end = due + (job["seconds"] if pause_s else float("inf"))
    number = 0
    while due < end:
        number += 1
        for index in range(len(databases)):
            due += step
            time.sleep(max(0.0, due - time.monotonic()))
            commit(index, number)
    time.sleep(pause_s)
    rng = random.Random(job["seed"])
    moments = sorted((rng.random() * job["window_s"], index) for index in range(len(databases)))
    begin = time.monotonic()
    for moment, index in moments:
        time.sleep(max(0.0, begin + moment - time.monotonic()))
        commit(index, number + 1)
    time.sleep(max(0.0, begin + job["window_s"] - time.monotonic()))
    os.write(notes, b"end 0 %d\n" % time.monotonic_ns())
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


# --- outage ---------------------------------------------------------------------------------------


def outage(job: Job) -> Job:
    """Many commits, then some that are timed; the parent makes the store come and go."""
    db = open_database(job)
    db.execute("create table seq(id integer primary key, mark blob)")
    db.execute("create table t(id integer primary key, a integer, b blob)")
    db.execute("insert into seq values(1, ?)", (MARK % 0,))
    rng = random.Random(7)
    rows = job["rows"]
    db.execute("begin")
    db.executemany(
        "insert into t values(?, 0, ?)", ((n, rng.randbytes(PAYLOAD_BYTES)) for n in range(rows))
    )
    db.execute("commit")
    sync(job, db)
    handshake()
    ids = [rng.randrange(rows) for _ in range(100_000)]
    update = "update t set a = a + 1, b = ? where id = ?"
    payload = rng.randbytes(PAYLOAD_BYTES)
    for number in range(job["backlog"]):
        db.execute(update, (payload, ids[number % 100_000]))
    handshake()
    clock = time.perf_counter
    times = []
    before = clock()
    end = before + job["seconds"]
    while before < end:
        db.execute(update, (payload, ids[-1 - len(times) % 100_000]))
        after = clock()
        times.append(after - before)
        before = after
    db.execute("update seq set mark = ?", (MARK % 1,))
    times.sort()
    handshake(
        p50_us=percentile(times, 0.5) * 1e6,
        p999_us=percentile(times, 0.999) * 1e6,
        max_ms=times[-1] * 1e3,
        n=len(times),
    )
    sync(job, db)
    handshake(caught_up=time.monotonic())
    db.close()
    return {}


# --- take-over ------------------------------------------------------------------------------------


def take_over(job: Job) -> Job:
    """One of several processes: durable commits, each written down; on its own until killed."""
    db = open_database({**job, "settings": {"durability": "replica"}})
    db.set_busy_timeout(30_000)
    db.execute("create table if not exists t(w integer, n integer, b blob, primary key(w, n))")
    notes = os.open(job["notes"], os.O_WRONLY | os.O_APPEND)
    payload = os.urandom(PAYLOAD_BYTES)
    handshake()
    writer = job["writer"]
    end = time.monotonic() + job["seconds"]
    number = 0
    while time.monotonic() < end:
        number += 1
        before = time.monotonic_ns()
        db.execute("insert into t values(?, ?, ?)", (writer, number, payload))
        os.write(notes, b"%d %d %d %d\n" % (writer, number, before, time.monotonic_ns()))
    db.close()
    return {}


# --- resync ---------------------------------------------------------------------------------------


def resync(job: Job) -> Job:
    """Everything is in the replica; then others change the database, and it is to be so again."""
    if not os.path.exists(job["path"]):
        make_database(job["path"], job["bytes"])
    db = open_database(job)
    sync(job, db, 900)
    if job["closed"]:
        db.close()
    handshake()
    started = time.monotonic()
    if job["closed"]:
        db = open_database(job)
    sync(job, db, 900)
    seconds = time.monotonic() - started
    db.close()
    return {"seconds": seconds}


def levels(job: Job) -> Job:
    """Commits at a steady rate, while the engine is idle otherwise and while it merges without end.

    What was merged is taken from the log, by level: bytes read, seconds.
    """
    import logging

    merged: dict[int, list[tuple[int, float]]] = {}

    class Merged(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.DEBUG and isinstance(record.args, tuple):
                _, level, n_segments, size, _, _, seconds = record.args
                if n_segments > 1:  # one is copied
                    merged.setdefault(level, []).append((size, seconds))

    logger = logging.getLogger("walship.levels")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(Merged())
    make_database(job["path"], job["bytes"])
    off = {"levels": [], "snapshot_interval": 0}
    on = {"levels": ["1s"], "snapshot_interval": "1s", "snapshot_retention": "1s"}
    results: Job = {}
    for name, settings in (("idle", off), ("merging", on)):
        db = open_database({**job, "settings": settings})
        sync(job, db)
        if name == "idle":
            _grow_segments(job, db)
            handshake()
        else:
            time.sleep(1.0)
        before_mb = high_water_kb() / 1024
        with _children_watched() as children_mb:
            times = sorted(_paced(db, job["seconds"], job["rate"]))
        results[f"{name}_p50_us"] = percentile(times, 0.5) * 1e6
        results[f"{name}_p999_us"] = percentile(times, 0.999) * 1e6
        results[f"{name}_max_ms"] = times[-1] * 1e3
        results[f"{name}_mb"] = high_water_kb() / 1024 - before_mb + max(children_mb, default=0)
        db.close()
    for level, found in merged.items():
        seconds = sum(each[1] for each in found)
        results[f"level_{level}_mb_per_s"] = sum(each[0] for each in found) / 1e6 / seconds
        results[f"level_{level}_n"] = len(found)
    return results


@contextlib.contextmanager
def _children_watched() -> Iterator[list[float]]:
    """Peak memory of each child process, MB, as far as a look now and then shows it."""
    found: list[float] = []
    done = threading.Event()

    def look() -> None:
        tasks = [f"/proc/self/task/{task}/children" for task in os.listdir("/proc/self/task")]
        for path in tasks:
            with contextlib.suppress(OSError), open(path) as file:
                found.extend(high_water_kb(int(pid)) / 1024 for pid in file.read().split())

    def run() -> None:
        while not done.wait(0.5):
            look()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def _grow_segments(job: Job, db: apsw.Connection) -> None:
    """Segments of a megabyte with changes all over the database."""
    rows: int = db.execute("select max(id) from t").get
    rng = random.Random(6)
    for _ in range(job["segments"]):
        db.execute("begin")
        for _ in range(250):
            db.execute(
                "update t set b = ? where id = ?", (rng.randbytes(3200), rng.randrange(1, rows + 1))
            )
        db.execute("commit")
        sync(job, db)


def _paced(db: apsw.Connection, seconds: float, rate: float) -> list[float]:
    times = []
    due = time.perf_counter()
    end = due + seconds
    number = 0
    while due < end:
        due += 1 / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        number += 1
        before = time.perf_counter()
        db.execute("update t set b = randomblob(100) where id = ?", (number % 1000 + 1,))
        times.append(time.perf_counter() - before)
    return times


def foreign(job: Job) -> Job:
    """Row changes by a program that knows nothing of replication, and a checkpoint of its own."""
    db = open_database(job)
    rows: int = db.execute("select max(id) from t").get
    rng = random.Random(job["seed"])
    handshake()
    for number in range(job["changes"]):
        if number == job["changes"] // 2:
            db.pragma("wal_checkpoint", "restart")
        change = (rng.randbytes(3000), rng.randrange(1, rows + 1))
        db.execute("update t set b = ? where id = ?", change)
    db.close()
    return {}


# --- bulk -----------------------------------------------------------------------------------------


def filler(size: int, seed: int = 0) -> Callable[[], bytes]:
    """Rows of ``size`` bytes of which about 69 % is noise: LZ4 leaves about that much of them.

    A thousand are made beforehand and taken in turn, so that making them costs the application
    nothing; no two of them share a page's worth of bytes.
    """
    rng = random.Random(seed)
    n_noise = int(size * 0.69)
    text = (b"the quick brown fox jumps over the lazy dog " * (size // 40 + 1))[: size - n_noise]
    return itertools.cycle([rng.randbytes(n_noise) + text for _ in range(1000)]).__next__


def load(db: apsw.Connection, make: Callable[[], bytes], n_bytes: int, row_bytes: int) -> None:
    """One transaction of about ``n_bytes``."""
    db.execute("begin")
    db.executemany(
        "insert into t(b) values(?)", ((make(),) for _ in range(max(1, n_bytes // row_bytes)))
    )
    db.execute("commit")


def bulk(job: Job) -> Job:
    """Large transactions; the parent watches them arrive."""
    db = open_database(job)
    db.execute("create table t(id integer primary key, b blob)")
    sync(job, db)
    make = filler(3300)
    handshake()
    started = time.monotonic()
    for size in job["transactions"]:
        load(db, make, size, 3400)
    committed = time.monotonic()
    pages = db.pragma("page_count")
    sync(job, db)
    synced = time.monotonic()
    facts = {
        "started": started,
        "committed": committed,
        "synced": synced,
        "pages": pages,
        "page_size": db.pragma("page_size"),
    }
    print(json.dumps(facts), flush=True)
    sys.stdin.readline()
    db.close()
    return {"peak_mb": high_water_kb() / 1024}


# --- restore --------------------------------------------------------------------------------------


def build(job: Job) -> Job:
    """A replica: one large first segment, then many small ones."""
    import walship

    if not os.path.exists(job["path"]):
        make_database(job["path"], job["bytes"])
    db = open_database(job)
    sync(job, db)
    handshake()
    rows: int = db.execute("select max(id) from t").get
    rng = random.Random(5)
    for _ in range(job["segments"]):
        db.execute("begin")
        for _ in range(job.get("changes", 3)):
            db.execute(
                "update t set b = ? where id = ?", (rng.randbytes(3200), rng.randrange(1, rows + 1))
            )
        db.execute("commit")
        walship.replication(db).sync(60)
    time.sleep(job.get("rest_s", 0))
    status = walship.replication(db).status()
    db.close()
    return {"txid": status.replicated_txid}


def make_database(path: str, n_bytes: int, row_bytes: int = 3400) -> None:
    """A plain database of about ``n_bytes``, without a WAL left."""
    db = apsw.Connection(path)
    db.pragma("journal_mode", "wal")
    db.pragma("synchronous", "OFF")
    db.execute("create table t(id integer primary key, b blob)")
    make = filler(row_bytes - 100)
    left = n_bytes
    while left > 0:
        load(db, make, min(left, 100_000_000), row_bytes)
        left -= 100_000_000
    db.close()


def fetch(job: Job) -> Job:
    """The floor under any restore: the large object by parallel ranged GETs, bytes dropped."""
    import boto3
    from botocore.config import Config

    client = boto3.session.Session().client(
        "s3",
        endpoint_url=job["endpoint"],
        config=Config(s3={"addressing_style": "path"}, max_pool_connections=16),
    )
    handshake()
    size, part = job["size"], 8 << 20

    def one(start: int) -> int:
        end = min(size, start + part) - 1
        answer = client.get_object(
            Bucket=job["bucket"], Key=job["key"], Range=f"bytes={start}-{end}"
        )
        n = 0
        while data := answer["Body"].read(1 << 20):
            n += len(data)
        return n

    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        total = sum(pool.map(one, range(0, size, part)))
    seconds = time.monotonic() - started
    client.close()
    assert total == size
    return {"seconds": seconds}


# --- memory ---------------------------------------------------------------------------------------


def transaction(job: Job) -> Job:
    """One large transaction; peak memory of the process."""
    db = open_database(job)
    db.execute("create table t(id integer primary key, b blob)")
    sync(job, db)
    handshake()
    started = time.monotonic()
    load(db, filler(7900), job["bytes"], 8000)
    committed = time.monotonic()
    sync(job, db, 1200)
    synced = time.monotonic()
    db.close()
    return {
        "peak_mb": high_water_kb() / 1024,
        "commit_s": committed - started,
        "sync_s": synced - committed,
    }


# --- crash ----------------------------------------------------------------------------------------


def crash(job: Job) -> Job:
    """Write until killed; then, in another process, a little more and an orderly end."""
    db = open_database(job)
    db.execute("create table if not exists t(id integer primary key, a integer, b blob)")
    rng = random.Random(job["seed"])
    handshake()
    end = job.get("commits")
    number = 0
    while end is None or number < end:
        number += 1
        _some_change(db, rng)
        if end is not None:
            time.sleep(0.002)
    digest = content(db)
    sync(job, db)
    db.close()
    return {"digest": digest}


def _some_change(db: apsw.Connection, rng: random.Random) -> None:
    top: int = db.execute("select coalesce(max(id), 0) from t").get
    db.execute("begin immediate")
    for _ in range(rng.choice((1, 1, 1, 2, 5, 40))):
        kind = rng.random()
        if kind < 0.6 or top == 0:
            db.execute(
                "insert into t(a, b) values(?, ?)",
                (rng.randrange(1 << 30), rng.randbytes(rng.choice((20, 200, 2000)))),
            )
        elif kind < 0.9:
            db.execute(
                "update t set a = a + 1, b = ? where id = ?",
                (rng.randbytes(300), rng.randrange(1, top + 1)),
            )
        else:
            db.execute("delete from t where id = ?", (rng.randrange(1, top + 1),))
    db.execute("commit")


def content(db: apsw.Connection) -> str:
    """Digest of every row."""
    digest = hashlib.sha256()
    for row in db.execute("select id, a, b from t order by id"):
        digest.update(repr(row).encode())
    return digest.hexdigest()


TASKS: dict[str, Callable[[Job], Job]] = {
    task.__name__: task
    for task in (
        commits,
        reads,
        paced,
        single,
        idle,
        durable,
        lose,
        outage,
        take_over,
        resync,
        levels,
        foreign,
        bulk,
        build,
        fetch,
        transaction,
        crash,
    )
}


def main(arguments: Sequence[str]) -> None:
    job: Job = json.loads(arguments[0])
    print(json.dumps(TASKS[job["task"]](job)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
