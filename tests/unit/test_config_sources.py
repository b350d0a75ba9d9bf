"""Settings of replicas and databases from keywords, mappings, URLs and the environment."""

from __future__ import annotations

import base64
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from walship.replica.config.levels import LEVEL_KEYS
from walship.replica.config.sources import (
    DATABASE_KEYS,
    REPLICA_KEYS,
    WITHOUT_EFFECT,
    DatabaseSettings,
    ReplicaSettings,
    database_settings,
    default_replica,
    parse_replica,
)
from walship.replica.errors import ConfigError
from walship.replica.store.settings import LocalSettings, S3Settings

MIB = 1024 * 1024


def s3(replica: Any, environ: dict[str, str] | None = None, **more: object) -> S3Settings:
    """The S3 settings of a replica."""
    store = parse_replica(replica, environ=environ or {}, **more).store
    assert isinstance(store, S3Settings)
    return store


def test_the_tigris_guide() -> None:
    """The guide's URL needs nothing else to be right for Tigris."""
    store = s3("s3://BUCKET?endpoint=fly.storage.tigris.dev&region=auto")
    assert store == S3Settings(
        bucket="BUCKET",
        endpoint="https://fly.storage.tigris.dev",
        region="auto",
        force_path_style=True,
        require_content_md5=False,
        tigris_consistent=True,
    )


def test_the_guides_fields() -> None:
    """The guide's expanded form means the same, with its path and keys."""
    store = s3(
        {
            "type": "s3",
            "bucket": "BUCKET",
            "path": "db",
            "endpoint": "fly.storage.tigris.dev",
            "region": "auto",
            "access-key-id": "tid_x",
            "secret-access-key": "tsec_y",
            "sign-payload": True,
            "require-content-md5": "false",
        }
    )
    assert (store.bucket, store.path, store.region) == ("BUCKET", "db", "auto")
    assert (store.access_key_id, store.secret_access_key) == ("tid_x", "tsec_y")
    assert store.tigris_consistent
    assert not store.require_content_md5


def test_the_variables_of_fly() -> None:
    """All five variables that Fly sets are read."""
    environ = {
        "AWS_ACCESS_KEY_ID": "tid_x",
        "AWS_SECRET_ACCESS_KEY": "tsec_y",
        "AWS_ENDPOINT_URL_S3": "https://fly.storage.tigris.dev",
        "AWS_REGION": "auto",
        "BUCKET_NAME": "my-bucket",
    }
    for replica in ("s3:///app", {"type": "s3", "path": "app"}):
        store = s3(replica, environ)
        assert (store.bucket, store.path) == ("my-bucket", "app")
        assert store.endpoint == "https://fly.storage.tigris.dev"
        assert store.region == "auto"
        assert store.tigris_consistent
        assert (store.access_key_id, store.secret_access_key) == ("tid_x", "tsec_y")


def test_precedence() -> None:
    """Keyword before field before URL before variable."""
    environ = {"AWS_REGION": "env", "AWS_ENDPOINT_URL_S3": "https://env.example.com"}
    assert s3("s3://b", environ).region == "env"
    assert s3("s3://b?region=url", environ).region == "url"
    assert s3({"url": "s3://b?region=url", "region": "field"}, environ).region == "field"
    both = {"url": "s3://b?region=url", "region": "field"}
    assert s3(both, environ, region="keyword").region == "keyword"
    assert s3("s3://b", environ).endpoint == "https://env.example.com"
    assert s3("s3://b?endpoint=https://url.example.com", environ).endpoint == (
        "https://url.example.com"
    )


def test_endpoint_and_region_variables() -> None:
    """AWS_ENDPOINT_URL_S3 goes before AWS_ENDPOINT_URL, AWS_REGION before AWS_DEFAULT_REGION."""
    environ = {"AWS_ENDPOINT_URL": "https://general.example.com", "AWS_DEFAULT_REGION": "general"}
    assert s3("s3://b", environ).endpoint == "https://general.example.com"
    assert s3("s3://b", environ).region == "general"
    environ |= {"AWS_ENDPOINT_URL_S3": "https://s3.example.com", "AWS_REGION": "special"}
    assert s3("s3://b", environ).endpoint == "https://s3.example.com"
    assert s3("s3://b", environ).region == "special"


def test_litestream_variables_fill_in() -> None:
    """LITESTREAM_* keys count only where the AWS_* variable is unset."""
    both = {
        "LITESTREAM_ACCESS_KEY_ID": "ls-id",
        "LITESTREAM_SECRET_ACCESS_KEY": "ls-secret",
        "AWS_SESSION_TOKEN": "token-of-other-keys",
    }
    store = s3("s3://b", both)
    assert (store.access_key_id, store.secret_access_key) == ("ls-id", "ls-secret")
    assert store.session_token is None
    store = s3("s3://b", {**both, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"})
    assert (store.access_key_id, store.secret_access_key) == ("id", "secret")
    assert store.session_token == "token-of-other-keys"


def test_credentials_come_together() -> None:
    """Explicit keys beat a profile of the environment; halves are refused."""
    environ = {"AWS_PROFILE": "p", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
    assert s3("s3://b", {"AWS_PROFILE": "p"}).profile == "p"
    store = s3("s3://b", environ, access_key_id="a", secret_access_key="b", session_token="t")
    assert (store.access_key_id, store.session_token, store.profile) == ("a", "t", None)
    store = s3("s3://b?profile=mine", environ)
    assert (store.profile, store.access_key_id) == ("mine", None)
    for half in (
        {"access_key_id": "a"},
        {"secret_access_key": "b"},
        {"session_token": "t"},
        {"access_key_id": "a", "secret_access_key": "b", "profile": "p"},
    ):
        with pytest.raises(ConfigError):
            s3("s3://b", {}, **half)
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY"):
        s3("s3://b", {"AWS_ACCESS_KEY_ID": "id"})


def test_secrets_are_not_shown() -> None:
    """No repr holds a secret."""
    key = base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
    replica = parse_replica(
        "s3://b",
        environ={},
        access_key_id="a",
        secret_access_key="s3cr3t",
        session_token="t0k3n",
        sse_customer_key=key,
    )
    database = database_settings("/x.db", replica)
    for shown in (repr(replica), repr(replica.store), repr(database), str(database)):
        assert "s3cr3t" not in shown
        assert "t0k3n" not in shown
        assert "0123456789abcdef" not in shown


def test_hyphens_and_underscores() -> None:
    """A mapping may use either."""
    one = s3({"bucket": "b", "part-size": "6MiB", "force-path-style": True})
    two = s3({"bucket": "b", "part_size": 6 * MIB, "force_path_style": "yes"})
    assert one == two
    assert one.part_size == 6 * MIB
    with pytest.raises(ConfigError, match="part-size is given twice"):
        s3({"bucket": "b", "part-size": 6 * MIB, "part_size": 6 * MIB})


@pytest.mark.parametrize(
    ("name", "value", "attribute", "expected"),
    [
        ("region", "eu", "region", "eu"),
        ("endpoint", "minio:9000", "endpoint", "http://minio:9000"),
        ("force-path-style", "true", "force_path_style", True),
        ("skip-verify", "true", "skip_verify", True),
        ("ca-bundle", "/ca.pem", "ca_bundle", Path("/ca.pem")),
        ("sign-payload", "false", "sign_payload", False),
        ("require-content-md5", "false", "require_content_md5", False),
        ("tigris-consistent", "true", "tigris_consistent", True),
        ("part-size", "16MiB", "part_size", 16 * MIB),
        ("concurrency", "9", "concurrency", 9),
        ("storage-class", "GLACIER_IR", "storage_class", "GLACIER_IR"),
        ("sse-kms-key-id", "alias/x", "sse_kms_key_id", "alias/x"),
        ("connect-timeout", "250ms", "connect_timeout_s", 0.25),
        ("read-timeout", "2m", "read_timeout_s", 120.0),
        ("max-connections", "3", "max_connections", 3),
        ("profile", "p", "profile", "p"),
    ],
)
def test_every_s3_setting(name: str, value: str, attribute: str, expected: object) -> None:
    """Each setting of an S3 replica arrives from a URL, a mapping and a keyword alike."""
    default = getattr(s3("s3://b"), attribute)
    assert default != expected
    assert getattr(s3(f"s3://b?{name}={value}"), attribute) == expected
    assert getattr(s3({"bucket": "b", name: value}), attribute) == expected
    assert getattr(s3("s3://b", {}, **{name.replace("-", "_"): value}), attribute) == expected


def test_ca_bundle_variable() -> None:
    """AWS_CA_BUNDLE is the file of certificates, unless they are not checked at all."""
    assert s3("s3://b", {"AWS_CA_BUNDLE": "/ca.pem"}).ca_bundle == Path("/ca.pem")
    system = {"SSL_CERT_FILE": "/system.pem"}
    assert s3("s3://b", system).ca_bundle == Path("/system.pem")
    assert s3("s3://b", {**system, "AWS_CA_BUNDLE": "/ca.pem"}).ca_bundle == Path("/ca.pem")
    assert s3("s3://b?skip-verify=true", {"AWS_CA_BUNDLE": "/ca.pem"}).ca_bundle is None


def test_provider_defaults() -> None:
    """Path style with any endpoint, two parts at once for R2; explicit values win."""
    assert not s3("s3://b").force_path_style
    assert s3("s3://b?endpoint=s3.example.com").force_path_style
    assert not s3("s3://b?endpoint=minio:9000&forcePathStyle=false").force_path_style
    r2 = "s3://b?endpoint=acc.r2.cloudflarestorage.com"
    assert (s3(r2).concurrency, s3(r2).region) == (2, "auto")
    assert s3(f"{r2}&concurrency=4").concurrency == 4
    tigris = "s3://b?endpoint=t3.storage.dev"
    assert s3(tigris).region == "auto"
    assert s3(f"{tigris}&requireContentMD5=true").require_content_md5
    assert not s3(tigris, {}, tigris_consistent=False).tigris_consistent
    assert not s3({"bucket": "b", "endpoint": "t3.storage.dev", "sign-payload": 0}).sign_payload


def test_five_megabytes_mean_the_smallest_part() -> None:
    """5MB, a little less than S3's lower limit, is taken as that limit; less is refused."""
    assert s3("s3://b?part-size=5MB").part_size == 5 * MIB
    for wrong in ("4MiB", "6GiB", "0"):
        with pytest.raises(ConfigError, match="part-size"):
            s3(f"s3://b?part-size={wrong}")


def test_customer_keys(tmp_path: Path) -> None:
    """An SSE-C key is 32 bytes in base64, in the setting or in a file, over https only."""
    key = bytes(range(32))
    encoded = base64.b64encode(key).decode()
    file = tmp_path / "key"
    file.write_text(encoded + "\n")
    assert s3("s3://b", {}, sse_customer_key=encoded).sse_customer_key == key
    store = s3("s3://b", {}, sse_customer_key_path=file, sse_customer_algorithm="AES256")
    assert (store.sse_customer_key, store.sse_customer_algorithm) == (key, "AES256")
    assert s3("s3://b?endpoint=http://localhost:1", {}, sse_customer_key=encoded).sse_customer_key
    assert s3("s3://b?endpoint=http://[::1]:1", {}, sse_customer_key=encoded).sse_customer_key
    for url, wrong, says in (
        ("s3://b?endpoint=http://s3.example.com", {"sse_customer_key": encoded}, "https"),
        ("s3://b", {"sse_customer_key": "c2hvcnQ="}, "32 bytes"),
        ("s3://b", {"sse_customer_key": "???"}, "base64"),
        ("s3://b", {"sse_customer_key_path": str(tmp_path / "none")}, "cannot read"),
        ("s3://b", {"sse_customer_key": encoded, "sse_customer_key_path": str(file)}, "one of"),
        ("s3://b", {"sse_customer_key": encoded, "sse_kms_key_id": "k"}, "one of"),
        ("s3://b", {"sse_customer_algorithm": "AES256"}, "belongs"),
        ("s3://b", {"sse_customer_key": encoded, "sse_customer_algorithm": "DES"}, "AES256"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            s3(url, {}, **wrong)
        assert encoded not in str(caught.value)


def test_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path, a file URL and a mapping with a path name a directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/x")
    for replica, expected in (
        ("backup/app", tmp_path / "backup" / "app"),
        (Path("backup"), tmp_path / "backup"),
        ("/abs/../x", Path("/x")),
        ("~/backup", Path("/home/x/backup")),
        ("file:///var/x", Path("/var/x")),
        ({"path": "/var/x"}, Path("/var/x")),
        ({"type": "file", "path": "/var/x"}, Path("/var/x")),
        ({"url": "file:///var/x"}, Path("/var/x")),
    ):
        settings = parse_replica(replica, environ={"AWS_REGION": "ignored"})
        assert settings.store == LocalSettings(path=expected)


@pytest.mark.parametrize(
    ("replica", "says"),
    [
        ("", "empty"),
        ({}, "where to"),
        ({"type": "s3"}, "BUCKET_NAME"),
        ("s3://", "BUCKET_NAME"),
        ({"url": "s3://b", "bucket": "c"}, "url and bucket are both given"),
        ({"url": "s3://b", "path": "c"}, "url and path are both given"),
        ({"url": "s3://b", "type": "file"}, "does not fit"),
        ({"bucket": "b/c"}, "slash"),
        ({"bucket": "b", "path": "a/../b"}, r"\.\."),
        ({"bucket": "b", "type": "ftp"}, "s3, file"),
        *[
            ({"bucket": "b", "type": kind}, f"type: {kind} is not supported: use ")
            for kind in ("gs", "abs", "sftp", "webdav", "nats", "oss")
        ],
        ({"path": "/x", "region": "eu"}, "region: not a setting of a replica in a directory"),
        ({"bucket": "b", "regoin": "eu"}, "did you mean region"),
        ({"bucket": "b", "concurrency": 0}, "concurrency"),
        ({"bucket": "b", "concurrency": "many"}, "whole number"),
        ({"bucket": "b", "max-connections": 0}, "max-connections"),
        ({"bucket": "b", "read-timeout": 0}, "read-timeout"),
        ({"bucket": "b", "sync-interval": "soon"}, "sync-interval: not a duration"),
        ({"bucket": "b", "skip-verify": "maybe"}, "neither true nor false"),
        ({"bucket": "b", "age": {"recipients": ["x"]}}, "encryption is not supported"),
        ({"bucket": "b\nc"}, "control character"),
        ({"bucket": ["b"]}, "text is expected"),
        ("abs://a@b/c", "not supported"),
    ],
)
def test_refusals(replica: Any, says: str) -> None:
    """A setting that cannot be used is a ConfigError in one line that names it."""
    with pytest.raises(ConfigError, match=says) as caught:
        parse_replica(replica, environ={})
    assert "\n" not in str(caught.value)


def test_sync_interval() -> None:
    """sync-interval is a second unless given, as number or duration, from everywhere."""
    assert parse_replica("s3://b", environ={}).sync_interval_s == 1.0
    assert parse_replica("s3://b?sync-interval=10ms", environ={}).sync_interval_s == 0.01
    assert parse_replica("s3://b", environ={}, sync_interval=0.5).sync_interval_s == 0.5
    assert parse_replica({"path": "/x", "sync-interval": "1m"}, environ={}).sync_interval_s == 60


def test_database_defaults() -> None:
    """A database without settings has the documented defaults."""
    settings = database_settings("/data/app.db", environ={})
    assert settings == DatabaseSettings(
        path=Path("/data/app.db"), meta_path=Path("/data/.app.db-walship")
    )
    assert settings.restore == "if-missing"
    assert settings.busy_timeout_s == 5.0
    assert settings.open_timeout_s == 10.0
    assert settings.shutdown_sync_timeout_s == 30.0
    assert settings.max_sync_wal_bytes == 64 * MIB


@pytest.mark.parametrize(
    ("keyword", "value", "attribute", "expected"),
    [
        ("meta_path", "/meta", "meta_path", Path("/meta")),
        ("restore", "never", "restore", "never"),
        ("restore_if_db_not_exists", False, "restore", "never"),
        ("busy_timeout", "250ms", "busy_timeout_s", 0.25),
        ("open_timeout", 3, "open_timeout_s", 3.0),
        ("shutdown_sync_timeout", 0, "shutdown_sync_timeout_s", 0.0),
        ("max_sync_wal_bytes", "1MiB", "max_sync_wal_bytes", MIB),
        ("page_size", 8192, "page_size", 8192),
        ("page_encoding", "frame", "page_encoding", "frame"),
        ("min_checkpoint_page_count", 10, "min_checkpoint_page_count", 10),
        ("max_spool_bytes", "1MiB", "max_spool_bytes", MIB),
        ("adopt", "yes", "adopt", True),
        ("spool_full", "block", "spool_full", "block"),
        ("spool_full_timeout", "5s", "spool_full_timeout_s", 5.0),
    ],
)
def test_every_database_setting(
    keyword: str, value: object, attribute: str, expected: object
) -> None:
    """Each setting of a database is a keyword."""
    settings = database_settings("/app.db", None, environ={}, **{keyword: value})
    assert getattr(settings, attribute) == expected
    assert getattr(database_settings("/app.db", environ={}), attribute) != expected


def test_no_setting_is_forgotten() -> None:
    """Every field of the settings can be set, and every key ends in a field."""
    in_file = {name.replace("-", "_") for name in (*REPLICA_KEYS, *DATABASE_KEYS, *WITHOUT_EFFECT)}
    fields = {
        field.name.removesuffix("_s")
        for kind in (S3Settings, LocalSettings, DatabaseSettings, ReplicaSettings)
        for field in dataclasses.fields(kind)
    } - {"store", "replica", "written_path"}
    assert fields <= in_file
    read_otherwise = {
        "type",
        "url",
        "sse_customer_key_path",
        "restore_if_db_not_exists",
        "validation",
    }
    read_otherwise |= {name.replace("-", "_") for name in LEVEL_KEYS}
    assert {name.replace("-", "_") for name in (*REPLICA_KEYS, *DATABASE_KEYS)} <= (
        fields | read_otherwise
    )
    assert not set(WITHOUT_EFFECT) & (set(REPLICA_KEYS) | set(DATABASE_KEYS))


def test_replica_keywords_of_a_database() -> None:
    """Keywords of the replica may stand beside those of the database."""
    settings = database_settings(
        "/app.db", "s3://b/app", environ={}, sync_interval=0.5, busy_timeout=1, region="eu"
    )
    assert settings.replica is not None
    assert settings.replica.sync_interval_s == 0.5
    assert isinstance(settings.replica.store, S3Settings)
    assert settings.replica.store.region == "eu"
    assert settings.busy_timeout_s == 1.0
    settings = database_settings("/app.db", environ={}, bucket="b")
    assert settings.replica == parse_replica("s3://b", environ={})
    ready = parse_replica("s3://b", environ={})
    assert database_settings("/app.db", ready, environ={}).replica is ready
    with pytest.raises(ConfigError, match="complete already"):
        database_settings("/app.db", ready, environ={}, region="eu")


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"busy_timout": 1}, "did you mean busy-timeout"),
        ({"page_size": 1000}, "power of two"),
        ({"page_size": 131072}, "power of two"),
        ({"page_encoding": "zip"}, "block, frame"),
        ({"restore": "always"}, "if-missing, never"),
        ({"min_checkpoint_page_count": 0}, "min-checkpoint-page-count"),
        ({"shutdown_sync_timeout": -1}, "not a duration"),
        ({"max_sync_wal_bytes": "much"}, "not a size"),
        ({"dir": "/x"}, "belongs into a configuration file"),
    ],
)
def test_database_refusals(keywords: dict[str, object], says: str) -> None:
    """An unknown or unusable keyword is refused by name."""
    with pytest.raises(ConfigError, match=says):
        database_settings("/app.db", None, environ={}, **keywords)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/x/app.db", "/x/app.db"),
        ("sqlite:///x/app.db", "/x/app.db"),
        ("sqlite3:///x/app.db", "/x/app.db"),
        ("~/app.db", "/home/x/app.db"),
        (Path("/x/../app.db"), "/app.db"),
    ],
)
def test_database_paths(path: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database may be written as path or as an SQLAlchemy-like URL."""
    monkeypatch.setenv("HOME", "/home/x")
    assert database_settings(path, environ={}).path == Path(expected)


@pytest.mark.parametrize("path", ["", ":memory:", "sqlite://"])
def test_no_database_file(path: str) -> None:
    """What is no file cannot be replicated."""
    with pytest.raises(ConfigError, match="not a database file"):
        database_settings(path, environ={})


@pytest.mark.parametrize("path", ["file:app.db?replica=r", "file:///data/app.db", "s3://b/app"])
def test_a_url_is_no_database_file(path: str) -> None:
    """SQLite would make a file of that name."""
    with pytest.raises(ConfigError, match="is a URL"):
        database_settings(path, environ={})


def test_replicas_in_the_database_s_own_place(tmp_path: Path) -> None:
    """Neither the database nor its local state can be the replica as well."""
    file = tmp_path / "app.db"
    for replica in (file, tmp_path / ".app.db-walship", tmp_path / ".app.db-walship" / "r"):
        with pytest.raises(ConfigError, match="replica: "):
            database_settings(file, replica, environ={})
    with pytest.raises(ConfigError, match="meta-path: "):
        database_settings(file, tmp_path / "r", meta_path=str(file), environ={})


def test_durations_that_nothing_can_count() -> None:
    """SQLite's and the locks' clocks have an end; a longer time is refused, not cut."""
    for setting, value in (("busy_timeout", "30d"), ("open_timeout", 1e10)):
        with pytest.raises(ConfigError, match=setting.replace("_", "-")):
            database_settings("/data/app.db", environ={}, **{setting: value})


def test_the_implicit_switch() -> None:
    """WALSHIP_REPLICA alone names a replica by itself; other variables never do."""
    others = {"BUCKET_NAME": "my-bucket", "AWS_REGION": "auto"}
    assert default_replica(others) is None
    assert default_replica({**others, "WALSHIP_REPLICA": " "}) is None
    for text in ("s3://$BUCKET_NAME/app", "s3://${BUCKET_NAME}/app"):
        replica = default_replica({**others, "WALSHIP_REPLICA": text})
        assert replica == parse_replica("s3://my-bucket/app", environ=others)
    with pytest.raises(ConfigError, match="NO_SUCH"):
        default_replica({"WALSHIP_REPLICA": "s3://$NO_SUCH/app"})


def test_settings_without_effect_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """A setting that changes nothing is accepted and logged with the reason."""
    with caplog.at_level(logging.INFO):
        database_settings("/app.db", "s3://b", environ={}, monitor_interval="1s")
        parse_replica({"bucket": "b", "auto-recover": True}, environ={})
    assert [(r.levelname, "monitor-interval" in r.getMessage()) for r in caplog.records] == [
        ("INFO", True),
        ("INFO", False),
    ]


def test_nothing_is_connected_or_imported() -> None:
    """Reading settings needs no SDK."""
    import subprocess
    import sys

    program = (
        "import sys; from walship.replica.config.sources import parse_replica; "
        "import walship.replica.store.opening; "
        "parse_replica('s3://b/p', environ={}); "
        "assert not {'boto3', 'botocore', 'urllib3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("endpoint", "region"),
    [
        ("s3.eu-central-003.backblazeb2.com", "eu-central-003"),
        ("https://fra1.digitaloceanspaces.com", "fra1"),
        ("s3.fr-par.scw.cloud", "fr-par"),
        ("fsn1.your-objectstorage.com", "fsn1"),
        ("s3.eu-west-3.amazonaws.com", "eu-west-3"),
        ("s3.amazonaws.com", "elsewhere"),
        ("s3.example.com", "elsewhere"),
    ],
)
def test_region_of_an_endpoint(endpoint: str, region: str) -> None:
    """A region in the endpoint's name wins over the environment, and gives way to the setting."""
    url = f"s3://b/p?endpoint={endpoint}"
    environ = {"AWS_REGION": "elsewhere"}
    found = parse_replica(url, environ=environ).store
    assert isinstance(found, S3Settings)
    assert found.region == region
    given = parse_replica(f"{url}&region=mine", environ=environ).store
    assert isinstance(given, S3Settings)
    assert given.region == "mine"
