"""The same replica restored by walship and by the real Litestream gives the same bytes."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from support.replicas import local_store, sha256
from support.servers import S3Endpoint
from walship.replica.clock import SystemClock
from walship.replica.plan import format_time
from walship.replica.restore import list_replica, restore
from walship.replica.store.base import ObjectStore
from walship.replica.store.opening import open_store
from walship.replica.store.settings import S3Settings

CLOCK = SystemClock()

Run = Callable[..., None]


@pytest.fixture
def run(litestream: Path) -> Run:
    """Runs Litestream with arguments; a failure shows what it printed."""

    # Litestream 0.5.17 opens no S3 replica while this is set.
    inherited = {name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE"}

    def call(*arguments: object, environ: Mapping[str, str] | None = None) -> None:
        done = subprocess.run(
            [litestream, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**inherited, **(environ or {})},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return call


def write_history(
    run: Run, database: Path, url: str, page_size: int, environ: Mapping[str, str] | None = None
) -> list[int]:
    """Replicate a small history with Litestream; times in ms between its steps.

    Ten syncs with inserts, updates, deletes, a VACUUM and snapshots in between.
    """
    rng = random.Random(page_size)
    moments = []
    for step in range(10):
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            if step == 0:
                connection.execute(f"pragma page_size={page_size}")
                connection.execute("pragma journal_mode=wal")
                connection.execute("create table t(id integer primary key, k int, b blob)")
                connection.execute("create index ti on t(k)")
            connection.execute("pragma wal_autocheckpoint=0")
            rows = [(rng.randrange(1000), rng.randbytes(rng.randrange(900))) for _ in range(120)]
            if step == 5:
                connection.execute("delete from t where id % 4 <> 0")
                connection.execute("vacuum")
            else:
                connection.executemany("insert into t(k, b) values (?, ?)", rows)
                connection.execute("update t set k = k + 1 where id % 7 = ?", (step,))
        force = ["-force-snapshot"] if step in (3, 7) else []
        run("replicate", "-once", *force, database, url, environ=environ)
        time.sleep(0.02)  # so that a moment lies strictly between two syncs
        moments.append(CLOCK.now_ms())
        time.sleep(0.02)
    return moments


def compare(
    run: Run,
    store: ObjectStore,
    url: str,
    directory: Path,
    moments: list[int],
    environ: Mapping[str, str] | None = None,
) -> None:
    """Restore every state with both programs.

    Litestream gets a configuration file: with a URL it refuses times that are not between the
    storage times of its oldest and newest object.
    """
    config = directory / "litestream.yml"
    name = directory / "app.db"
    config.write_text(f"dbs:\n  - path: {name}\n    replica:\n      url: {url}\n")
    targets: list[tuple[list[str], int | None, int | None]] = [([], None, None)]
    txids = sorted({segment.max_txid for segment in list_replica(store)})
    assert len(txids) >= 10
    targets += [(["-txid", f"{txid:016x}"], txid, None) for txid in txids]
    targets += [(["-timestamp", format_time(moment)], None, moment) for moment in moments]
    for number, (flags, txid, moment) in enumerate(targets):
        theirs, ours = directory / f"theirs-{number}.db", directory / f"ours-{number}.db"
        run("restore", *flags, "-config", config, "-o", theirs, name, environ=environ)
        restore(store, ours, clock=CLOCK, txid=txid, timestamp_ms=moment, integrity_check="full")
        assert sha256(ours) == sha256(theirs), flags


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_directory_replica(run: Run, page_size: int, tmp_path: Path) -> None:
    """A directory replica: the newest state, every TXID and times between them."""
    url = f"file://{tmp_path}/replica"
    moments = write_history(run, tmp_path / "app.db", url, page_size)
    compare(run, local_store(tmp_path / "replica"), url, tmp_path, moments)


def test_s3_replica(run: Run, s3_server: S3Endpoint, tmp_path: Path) -> None:
    """A replica on a real S3 server; times come from the metadata of its objects."""
    bucket = s3_server.make_bucket()
    url = s3_server.replica_url(bucket, "backups/app.db")
    moments = write_history(run, tmp_path / "app.db", url, 4096, s3_server.environ)
    store = open_store(
        S3Settings(
            bucket=bucket,
            path="backups/app.db",
            endpoint=s3_server.url,
            region=s3_server.region,
            access_key_id=s3_server.access_key_id,
            secret_access_key=s3_server.secret_access_key,
            force_path_style=True,
        ),
        CLOCK,
    )
    with closing(store):
        compare(run, store, url, tmp_path, moments, s3_server.environ)
