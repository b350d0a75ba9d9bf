"""Replicas where Litestream puts them by odd paths: found, restored, continued, and handed back.

A recording endpoint keeps keys exactly as they are sent, which not every real server does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

import walship
from support.databases import WAIT_S
from support.recording import RecordingEndpoint, recording_endpoint
from walship import cli
from walship.vfs.registry import registry

pytestmark = pytest.mark.litestream

#: The replica in a configuration file, and what stands before its keys.
FORMS = {
    "url: s3://bucket?endpoint=ENDPOINT&region=auto": "./",
    "url: s3://bucket/?endpoint=ENDPOINT&region=auto": "/",
    "{type: s3, bucket: bucket, endpoint: 'ENDPOINT'}": "/",
    "{type: s3, bucket: bucket, endpoint: 'ENDPOINT', path: /app}": "/app/",
    "{type: s3, bucket: bucket, endpoint: 'ENDPOINT', path: app/}": "app//",
    "url: s3://bucket/a//b/?endpoint=ENDPOINT": "a/b/",
}


@pytest.fixture
def endpoint() -> Iterator[RecordingEndpoint]:
    """An endpoint; what a test configures ends with it."""
    settings = dict(registry._settings)
    with recording_endpoint() as running:
        yield running
    registry._settings = settings


@pytest.mark.parametrize("form", FORMS)
def test_one_file_for_both(
    litestream: Path,
    endpoint: RecordingEndpoint,
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same configuration file means the same place to both, whoever began the replica."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    database, out = tmp_path / "app.db", tmp_path / "out.db"
    config = tmp_path / "litestream.yml"
    config.write_text(
        f"dbs:\n  - path: {database}\n    replica:\n      "
        f"{form.replace('ENDPOINT', endpoint.url)}\n"
    )
    with contextlib.closing(apsw.Connection(str(database))) as db:
        db.pragma("journal_mode", "wal")
        db.execute("create table t(x); insert into t values(1)")
    run(litestream, "replicate", "-config", config, "-once")
    assert {key.partition("0")[0] for key in endpoint.objects} == {f"bucket/{FORMS[form]}"}

    assert cli.main(["restore", "-config", str(config), "-o", str(out), str(database)]) == 0
    assert rows(out) == [1]

    walship.configure(config)
    with contextlib.closing(walship.connect(database)) as connection:
        connection.execute("insert into t values(2)")
        walship.replication(connection).sync(WAIT_S)
    assert {key.partition("0")[0] for key in endpoint.objects if key.endswith(".ltx")} == {
        f"bucket/{FORMS[form]}"
    }
    run(litestream, "restore", "-config", config, "-o", tmp_path / "back.db", database)
    assert rows(tmp_path / "back.db") == [1, 2]


def run(*words: object) -> None:
    """Run a program that has to succeed."""
    done = subprocess.run(
        [str(word) for word in words],
        env=dict(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def rows(database: Path) -> list[int]:
    """What the table holds."""
    with contextlib.closing(apsw.Connection(str(database))) as db:
        return [x for (x,) in db.execute("select x from t order by x")]
