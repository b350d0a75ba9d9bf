"""Configuration files as projects have them for Litestream: what each means here, what is said."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from walship.replica.config.sources import DatabaseSettings, load_config
from walship.replica.errors import ConfigError
from walship.replica.store.settings import S3Settings

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
#: Keys whose meaning is built elsewhere: whether something is said about them is not decided here.
ELSEWHERE = {
    *("addr", "exec", "heartbeat-interval", "heartbeat-url", "socket", "validation"),
    *("levels", "snapshot", "snapshot-interval", "retention", "retention-check-interval"),
    *("l0-retention", "l0-retention-check-interval", "verify-compaction", "validation-interval"),
    *("auto-recover", "shutdown-sync-interval", "mcp-addr"),
}

B2 = "https://s3.eu-central-003.backblazeb2.com"
HETZNER = "https://nbg1.your-objectstorage.com"


@dataclass
class Case:
    """What a file means.

    Attributes:
        databases: by path, where each is shipped to: a directory, or what is not as usual.
        environ: variables that it relies on.
        said: keys that are mentioned, besides those of `ELSEWHERE`.
    """

    databases: dict[str, str | dict[str, Any]]
    environ: dict[str, str] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)


def s3(bucket: str, path: str, endpoint: str | None = None, **more: Any) -> dict[str, Any]:
    """A replica in S3; path style with an endpoint unless ``more`` says otherwise."""
    found = {"bucket": bucket, "path": path, "endpoint": endpoint}
    return {**found, "force_path_style": endpoint is not None, **more}


CASES = {
    "aws-single": Case(
        {
            "/var/lib/app/production.sqlite3": s3(
                "acme-backups",
                "production",
                region="eu-central-1",
                storage_class="STANDARD_IA",
                sse_kms_key_id="arn:aws:kms:eu-central-1:123456789012:key/0d3b7a4e",
                access_key_id=None,
            )
        }
    ),
    "many": Case(
        {
            f"/rails/storage/{name}.sqlite3": s3("rails", name, region="us-east-1")
            for name in ("production", "production_cache", "production_queue")
        },
        {
            "REPLICA_BUCKET": "rails",
            "LITESTREAM_ACCESS_KEY_ID": "k",
            "LITESTREAM_SECRET_ACCESS_KEY": "s",
        },
        {"monitor-interval", "checkpoint-interval", "truncate-page-n"},
    ),
    "release-0.3": Case(
        {
            "/pb_data/data.db": s3(
                "pocketbase",
                "pb_data/data.db",
                "https://s3.us-west-002.backblazeb2.com",
                region="us-west-002",
                secret_access_key="abc/def+ghi==",
            )
        },
        said={"name"},
    ),
    "directories": Case(
        {
            "/data/main.db": s3("tenants", "main", HETZNER, region="nbg1", access_key_id="k"),
            "/data/tenants/x/y.db": s3("tenants", "eu/x/y.db", HETZNER, secret_access_key="s"),
        },
        {"HETZNER_KEY": "k", "HETZNER_SECRET": "s"},
    ),
    "tigris": Case(
        {
            "/data/myapp.db": s3(
                "my-bucket",
                "",
                "https://fly.storage.tigris.dev",
                region="auto",
                sign_payload=True,
                require_content_md5=False,
                tigris_consistent=True,
                access_key_id="tid_x",
            )
        },
        {
            "BUCKET_NAME": "my-bucket",
            "AWS_ACCESS_KEY_ID": "tid_x",
            "AWS_SECRET_ACCESS_KEY": "tsec_y",
            "AWS_ENDPOINT_URL_S3": "https://fly.storage.tigris.dev",
            "AWS_REGION": "auto",
        },
    ),
    "r2": Case(
        {
            "~/memos/memos_prod.db": s3(
                "memos",
                "db",
                "https://0123456789abcdef.r2.cloudflarestorage.com",
                region="auto",
                concurrency=2,
                part_size=10_000_000,
            )
        },
        {"R2_ACCESS_KEY_ID": "k", "R2_SECRET_ACCESS_KEY": "s"},
    ),
    "b2": Case(
        {
            "/config/vaultwarden/db.sqlite3": s3(
                "vault", "vaultwarden", B2, region="eu-central-003", access_key_id="003abc"
            )
        }
    ),
    "digitalocean": Case(
        {
            "/srv/forum/forum.db": s3(
                "space",
                "forum",
                "https://fra1.digitaloceanspaces.com",
                region="fra1",
                force_path_style=False,
            )
        }
    ),
    "hetzner": Case(
        {"/srv/app.db": s3("app", "app.db", "https://fsn1.your-objectstorage.com", region="fsn1")}
    ),
    "scaleway": Case(
        {
            "/app/db/production.sqlite3": s3(
                "production", "db", "https://s3.fr-par.scw.cloud", region="fr-par"
            )
        }
    ),
    "filebase": Case({"/app/data.db": s3("data", "app", "https://s3.filebase.com")}),
    "supabase": Case(
        {
            "/app/data.db": s3(
                "backups",
                "app",
                "https://abcdefghij.supabase.co/storage/v1/s3",
                region="eu-west-2",
            )
        }
    ),
    "minio": Case(
        {"/data/grafana.db": s3("litestream", "grafana", "http://minio:9000", skip_verify=True)}
    ),
    "gcs-interop": Case(
        {
            "/data/app.db": s3(
                "acme-litestream",
                "app",
                "https://storage.googleapis.com",
                region="auto",
                require_content_md5=False,
            )
        }
    ),
    "file": Case(
        {
            "/var/lib/grafana/grafana.db": "/mnt/nas/grafana",
            "/var/lib/gitea/gitea.db": "/mnt/nas/gitea",
            "/var/lib/freshrss/db.sqlite": "/mnt/nas/freshrss",
        }
    ),
    "everything": Case(
        {
            "/app.db": s3(
                "bucket",
                "app",
                "https://s3.example.com",
                region="eu",
                part_size=10 * 1024 * 1024,
                concurrency=3,
                storage_class="STANDARD",
                sse_customer_key=b"0123456789abcdef" * 2,
            )
        },
        said={
            *("monitor-interval", "checkpoint-interval", "max-checkpoint-page-count"),
            *("truncate-page-n", "name", "max-sync-ltx-files"),
        },
    ),
    "typos": Case(
        {"/app.db": s3("bucket", "app", region=None, access_key_id="key")},
        said={"log-level", "sync-interval", "regoin", "retenton"},
    ),
}

REFUSED = {
    "gs": "gs:// is not supported: use s3://BUCKET/PATH?endpoint=https://storage.googleapis.com",
    "gs-fields": "type: gs is not supported: use s3://BUCKET/PATH?endpoint=https://storage.goog",
    "abs": "type: abs is not supported: use s3://",
    "sftp": "type: sftp is not supported: use s3:// or a directory (a mounted one",
    "nats": "nats:// is not supported: use s3://",
    "webdav": "type: webdav is not supported: use s3://",
    "oss": "oss:// is not supported: use s3://BUCKET/PATH?endpoint=https://oss-REGION.aliyuncs.com",
    "age": "age: client-side encryption is not supported",
    "two-replicas": "replicas: exactly one replica is supported",
    "bucket-not-set": "url: the variable LITESTREAM_BUCKET is not set",
    "same-replica": "have the same replica: give each its own `path`",
}


def test_every_file_is_here() -> None:
    """No file lies around that nothing is expected of."""
    assert {file.stem for file in CONFIGS.glob("*.yml")} == set(CASES)
    assert {file.stem for file in (CONFIGS / "refused").glob("*.yml")} == set(REFUSED)


@pytest.mark.parametrize("name", CASES)
def test_what_a_file_means(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """It loads as it is; each database goes where it should; what is not needed is said once."""
    case = CASES[name]
    with caplog.at_level(logging.INFO):
        settings = load_config(CONFIGS / f"{name}.yml", environ=case.environ)
    for path, expected in case.databases.items():
        database = settings.database(path)
        assert database is not None, path
        check_replica(database, expected)
    named = {str(Path(path).expanduser()) for path in case.databases}
    assert {str(each.path) for each in settings.databases} <= named
    keys = [record.getMessage().split()[1].removeprefix("key=") for record in caplog.records]
    assert sorted(set(keys)) == sorted(keys), "each once"
    assert set(keys) - ELSEWHERE == case.said
    for record in caplog.records:
        print(record.levelname, record.getMessage())


def check_replica(database: DatabaseSettings, expected: str | dict[str, Any]) -> None:
    """The database is shipped to the expected place."""
    assert database.replica is not None
    store = database.replica.store
    if not isinstance(store, S3Settings):
        assert str(store.path) == expected
        return
    assert isinstance(expected, dict)
    assert {key: getattr(store, key) for key in expected} == expected


def test_other_settings_of_these_files() -> None:
    """What is not about the replica arrives too."""
    everything = load_config(CONFIGS / "everything.yml", environ={})
    assert (everything.addr, everything.exec) == ("127.0.0.1:9090", "myapp -addr :8080")
    assert (everything.logging.level, everything.logging.source) == ("debug", True)
    (database,) = everything.databases
    assert database.meta_path == Path("/state/app")
    assert (database.busy_timeout_s, database.restore) == (1.0, "if-missing")
    assert (database.min_checkpoint_page_count, database.max_sync_wal_bytes) == (1000, 64 << 20)
    assert database.shutdown_sync_timeout_s == 30.0
    old = load_config(CONFIGS / "release-0.3.yml", environ={}).databases[0]
    assert old.replica is not None
    assert old.replica.sync_interval_s == 30.0
    assert (old.levels.retention, old.levels.snapshot_retention_s) == (True, 168 * 3600.0)
    assert database.levels.snapshot_retention_s == 48 * 3600.0
    directory = load_config(CONFIGS / "directories.yml", environ={}).directories[0]
    assert (directory.recursive, directory.watch) == (True, True)
    tenant = directory.database("/data/tenants/x/y.db")
    assert tenant is not None
    assert tenant.meta_path == Path("/data/litestream/x/.y.db-walship")


def test_what_typos_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Each is a warning with the nearest name or the right place, and an error with -strict."""
    load_config(CONFIGS / "typos.yml", environ={})
    said = [record.getMessage() for record in caplog.records]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(said)
    by_key = {text.split()[1].removeprefix("key="): text for text in said}
    assert by_key["regoin"].endswith("(did you mean region?)")
    assert by_key["sync-interval"].endswith("where=a database (it belongs to a replica)")
    with pytest.raises(ConfigError, match=r"typos\.yml: unknown setting 'log-level'"):
        load_config(CONFIGS / "typos.yml", environ={}, strict=True)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    """One line names file and entry and says what to do; secrets are not in it."""
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "refused" / f"{name}.yml", environ={})
    message = str(caught.value)
    assert REFUSED[name] in message
    assert f"{name}.yml: " in message
    assert "\n" not in message
    assert "hunter2" not in message.lower()


def test_strictness_knows_every_key_of_litestream() -> None:
    """With -strict only what nobody knows is an error: a file that uses everything loads."""
    assert load_config(CONFIGS / "everything.yml", environ={}, strict=True).databases
