"""The Tigris guide, block by block and as it stands there, with a real server in Tigris's place.

The name ``fly.storage.tigris.dev`` leads to SeaweedFS behind TLS, at the socket: detection and
signatures see the real name.  What goes over the wire is in ``test_providers_wire``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import apsw
import pytest

import walship
from support.databases import WAIT_S
from support.recording import every_server_is, self_signed
from support.servers import S3Endpoint
from support.tls_front import tls_front
from walship import cli
from walship.vfs.registry import registry

TIGRIS = "fly.storage.tigris.dev"
VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("BUCKET_NAME", "WALSHIP_REPLICA", "WALSHIP_CONFIG", "LITESTREAM_CONFIG"),
    *("LITESTREAM_ACCESS_KEY_ID", "LITESTREAM_SECRET_ACCESS_KEY"),
)

GLOBAL_KEYS = """
access-key-id: tid_xxxxxxxxxxxxxxxxxxxx
secret-access-key: tsec_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx

dbs:
  - path: /path/to/local/db
    replica:
      url: s3://BUCKETNAME?endpoint=fly.storage.tigris.dev&region=auto
"""

FIELDS = """
dbs:
  - path: /path/to/local/db
    replica:
      type: s3
      bucket: BUCKETNAME
      path:   db
      endpoint: fly.storage.tigris.dev
      region: auto
"""

KEYS_OF_A_REPLICA = """
dbs:
  - path: /path/to/local/db
    replica:
      type: s3
      bucket: BUCKETNAME
      path:   db
      endpoint: fly.storage.tigris.dev
      region: auto
      access-key-id: tid_xxxxxxxxxxxxxxxxxxxx
      secret-access-key: tsec_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
"""

OVERRIDE = """
dbs:
  - path: /path/to/local/db
    replica:
      type: s3
      bucket: BUCKETNAME
      path:   db
      endpoint: fly.storage.tigris.dev
      region: auto
      sign-payload: true
      require-content-md5: false
"""

ON_FLY = """
dbs:
  - path: /data/myapp.db
    replica:
      url: s3://${BUCKET_NAME}?endpoint=fly.storage.tigris.dev&region=auto
"""

AWS = "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY"
LITESTREAM = "LITESTREAM_ACCESS_KEY_ID LITESTREAM_SECRET_ACCESS_KEY"
FLY = f"{AWS} AWS_ENDPOINT_URL_S3 AWS_REGION BUCKET_NAME"


class Guide:
    """Stands where the reader of the guide stands.

    Attributes:
        bucket: of the reader.
        database: stands for both paths in the guide.
    """

    def __init__(self, server: S3Endpoint, bucket: str, directory: Path) -> None:
        self.server = server
        self.bucket = bucket
        self.directory = directory
        self.database = directory / "local" / "db"
        self.database.parent.mkdir()

    def text(self, block: str) -> str:
        """A block of the guide with the reader's own bucket, keys and paths."""
        for theirs, ours in {
            "BUCKETNAME": self.bucket,
            "tid_xxxxxxxxxxxxxxxxxxxx": self.server.access_key_id,
            "tsec_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx": self.server.secret_access_key,
            "/path/to/local/db": str(self.database),
            "/data/myapp.db": str(self.database),
        }.items():
            block = block.replace(theirs, ours)
        return block

    def variable(self, name: str) -> str:
        """What the guide exports, or Fly injects, under this name."""
        return {
            "AWS_ENDPOINT_URL_S3": f"https://{TIGRIS}",
            "AWS_REGION": "auto",
            "BUCKET_NAME": self.bucket,
        }.get(
            name,
            self.server.secret_access_key if "SECRET" in name else self.server.access_key_id,
        )

    def commit(self, **settings: object) -> None:
        """Commit something and wait until the replica has it."""
        db = walship.connect(self.database, **settings)  # type: ignore[arg-type]
        db.execute("create table t(x); insert into t values(42)")
        walship.replication(db).sync(WAIT_S)
        db.close()

    def check(self, *words: str) -> None:
        """The command restores what was committed to ``my.db``."""
        output = self.directory / "my.db"
        output.unlink(missing_ok=True)
        assert cli.main(["restore", "-o", str(output), *words]) == 0
        with contextlib.closing(apsw.Connection(str(output))) as db:
            assert db.execute("select x from t").fetchall() == [(42,)]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for the name."""
    return self_signed(tmp_path_factory.mktemp("tls"), TIGRIS)


@pytest.fixture
def guide(
    seaweedfs_server: S3Endpoint,
    certificate: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Guide]:
    """A reader with a new bucket, and no variable set but the one for the certificate."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    reader = Guide(seaweedfs_server, seaweedfs_server.make_bucket(), tmp_path)
    settings = dict(registry._settings)
    port = urlsplit(seaweedfs_server.url).port
    assert port is not None
    with tls_front(certificate, port) as front, every_server_is(front.port):
        yield reader
    registry._settings = settings


@pytest.mark.parametrize(
    ("block", "variables", "first_key"),
    [
        (GLOBAL_KEYS, "", "0000/"),
        (FIELDS, AWS, "db/0000/"),
        (KEYS_OF_A_REPLICA, "", "db/0000/"),
        (OVERRIDE, AWS, "db/0000/"),
        (OVERRIDE, LITESTREAM, "db/0000/"),
        (ON_FLY, FLY, "0000/"),
    ],
    ids=["global keys", "fields", "keys of a replica", "override", "litestream", "fly"],
)
def test_a_file_of_the_guide(
    guide: Guide,
    block: str,
    variables: str,
    first_key: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The file as it stands there: replicated to, looked at, and restored from."""
    for name in variables.split():
        monkeypatch.setenv(name, guide.variable(name))
    file = guide.directory / "litestream.yml"
    file.write_text(guide.text(block))
    walship.configure(file, strict=True)
    guide.commit()
    guide.check("-config", str(file), str(guide.database))
    capsys.readouterr()
    assert cli.main(["status", "-json", "-config", str(file)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["status"] == "ok"
    assert row["replica_txid"] == row["local_txid"]
    assert cli.main(["databases", "-json", "-config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) == [{"path": str(guide.database), "replica": "s3"}]
    assert (
        cli.main(["ltx", "-json", "-level", "all", "-config", str(file), str(guide.database)]) == 0
    )
    assert json.loads(capsys.readouterr().out)[0]["min_txid"] == "0000000000000001"
    assert f"{first_key}0000000000000001-0000000000000001.ltx" in guide.server.keys(guide.bucket)


def test_the_commands_of_the_guide(guide: Guide, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two exported variables and a URL without a path."""
    for name in AWS.split():
        monkeypatch.setenv(name, guide.variable(name))
    url = guide.text("s3://BUCKETNAME?endpoint=fly.storage.tigris.dev&region=auto")
    guide.commit(replica=url)
    guide.check(url)


@pytest.mark.parametrize("parameters", ["&region=auto", ""], ids=["quoted", "cut by the shell"])
def test_replicate_of_the_guide(
    guide: Guide, parameters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``walship replicate`` with the line's arguments; without quotes the shell keeps the region
    to itself, which Tigris does not need."""
    for name in AWS.split():
        monkeypatch.setenv(name, guide.variable(name))
    with contextlib.closing(apsw.Connection(str(guide.database))) as db:
        db.execute("create table t(x); insert into t values(42)")
    url = guide.text(f"s3://BUCKETNAME?endpoint=fly.storage.tigris.dev{parameters}")
    assert cli.main(["replicate", "-once", str(guide.database), url]) == 0
    guide.check(url)


def test_nothing_but_what_fly_injects(guide: Guide, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the five variables a path is enough: the bucket and the endpoint are known."""
    for name in FLY.split():
        monkeypatch.setenv(name, guide.variable(name))
    guide.commit(replica="s3:///app")
    guide.check("s3:///app")
    guide.check(f"s3://{guide.bucket}/app")
