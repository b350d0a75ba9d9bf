"""Empty objects: what SeaweedFS keeps of a PUT whose client died between headers and body."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import apsw
import pytest

import walship
from support.servers import S3Endpoint
from walship.replica.store.base import SHA256_METADATA


def rows(path: Path) -> int:
    """How many rows a restored database has."""
    with closing(apsw.Connection(str(path))) as db:
        return int(db.execute("select count(*) from t").get)


def test_an_empty_object_is_replaced(tmp_path: Path) -> None:
    """An empty object under the next TXID is nobody's: the commit takes its place."""
    path, replica = tmp_path / "app.db", tmp_path / "replica"
    with closing(walship.connect(path, replica)) as db:
        db.execute("create table t(x)")
        txid = walship.replication(db).sync(30)
    empty = replica / "ltx" / "0" / f"{txid + 1:016x}-{txid + 1:016x}.ltx"
    empty.touch()
    with closing(walship.connect(path, replica)) as db:
        db.execute("insert into t values(1)")
        # Another segment may have come before the commit's: see `Capture._before_the_gate`.
        assert walship.replication(db).sync(30) > txid
    assert empty.stat().st_size > 0
    walship.restore(replica, tmp_path / "out.db")
    assert rows(tmp_path / "out.db") == 1


def test_an_empty_object_without_a_mark_is_damage(tmp_path: Path) -> None:
    """In a directory nothing says that an empty segment never arrived: a restore refuses it."""
    path, replica = tmp_path / "app.db", tmp_path / "replica"
    with closing(walship.connect(path, replica)) as db:
        db.execute("create table t(x)")
        txid = walship.replication(db).sync(30)
    (replica / "ltx" / "0" / f"{txid + 1:016x}-{txid + 1:016x}.ltx").touch()
    with pytest.raises(walship.FormatError):
        walship.restore(replica, tmp_path / "out.db")
    assert not (tmp_path / "out.db").exists()
    assert walship.restore(replica, tmp_path / "out.db", txid=txid).txid == txid


@pytest.mark.s3
def test_a_client_that_dies_after_the_headers(
    s3_server: S3Endpoint, make_bucket: Callable[[], str], tmp_path: Path
) -> None:
    """Headers of a PUT without its body, sent to a real server, do not stop the next writer."""
    bucket = make_bucket()
    path, replica = tmp_path / "app.db", s3_server.replica(bucket, "app")
    with closing(walship.connect(path, replica)) as db:
        db.execute("create table t(x)")
        txid = walship.replication(db).sync(30)
    key = f"app/0000/{txid + 1:016x}-{txid + 1:016x}.ltx"
    url = s3_server.client().generate_presigned_url(
        "put_object",
        Params={"Bucket": bucket, "Key": key, "Metadata": {SHA256_METADATA: "0" * 64}},
    )
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        target = f"{parts.path}?{parts.query}"
        head = (
            f"PUT {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: 500\r\n"
            f"x-amz-meta-{SHA256_METADATA}: {'0' * 64}\r\n\r\n"
        )
        connection.sendall(head.encode())
        time.sleep(0.2)
    time.sleep(0.3)
    assert walship.restore(replica, tmp_path / "before.db").txid == txid
    with closing(walship.connect(path, replica)) as db:
        db.execute("insert into t values(1)")
        assert walship.replication(db).sync(30) == txid + 1
    assert s3_server.keys(bucket, "app/0000/")[key] > 0
    os.unlink(path)
    walship.restore(replica, path)
    assert rows(path) == 1
