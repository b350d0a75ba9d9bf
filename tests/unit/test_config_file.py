"""Configuration files in Litestream's format."""

from __future__ import annotations

import itertools
import logging
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from walship.replica.config.levels import LevelSettings
from walship.replica.config.sources import DatabaseSettings, LoggingSettings, Settings, load_config
from walship.replica.errors import ConfigError
from walship.replica.store.settings import LocalSettings, S3Settings

Load = Callable[..., Settings]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a text as configuration file."""

    def from_text(text: str, environ: dict[str, str] | None = None, **more: bool) -> Settings:
        file = tmp_path / "walship.yml"
        file.write_text(text, encoding="utf-8")
        return load_config(file, environ=environ or {}, **more)

    return from_text


def store_of(database: DatabaseSettings) -> S3Settings:
    """The database's S3 settings."""
    assert database.replica is not None
    assert isinstance(database.replica.store, S3Settings)
    return database.replica.store


GUIDE_URL = """
access-key-id: tid_x
secret-access-key: tsec_y

dbs:
  - path: /path/to/local/db
    replica:
      url: s3://BUCKETNAME?endpoint=fly.storage.tigris.dev&region=auto
"""

GUIDE_FIELDS = """
dbs:
  - path: /path/to/local/db
    replica:
      type: s3
      bucket: BUCKETNAME
      path:   db
      endpoint: fly.storage.tigris.dev
      region: auto
      access-key-id: tid_x
      secret-access-key: tsec_y
      sign-payload: true
      require-content-md5: false
"""


@pytest.mark.parametrize(("text", "path"), [(GUIDE_URL, ""), (GUIDE_FIELDS, "db")])
def test_the_guides_files(load: Load, text: str, path: str) -> None:
    """The files of the Tigris guide are read as they are."""
    (database,) = load(text).databases
    assert database.path == Path("/path/to/local/db")
    assert store_of(database) == S3Settings(
        bucket="BUCKETNAME",
        path=path,
        endpoint="https://fly.storage.tigris.dev",
        region="auto",
        access_key_id="tid_x",
        secret_access_key="tsec_y",
        force_path_style=True,
        require_content_md5=False,
        tigris_consistent=True,
    )


def test_the_guides_bucket_variable(load: Load) -> None:
    """${BUCKET_NAME} in a URL is expanded."""
    text = """
dbs:
  - path: /data/myapp.db
    replica:
      url: s3://${BUCKET_NAME}?endpoint=fly.storage.tigris.dev&region=auto
"""
    assert store_of(load(text, {"BUCKET_NAME": "mine"}).databases[0]).bucket == "mine"
    with pytest.raises(ConfigError, match=r"url: the variable BUCKET_NAME is not set"):
        load(text)


def test_global_keys_are_defaults(load: Load) -> None:
    """Settings at top level hold for all replicas and databases that do not set them."""
    text = """
region: eu
part-size: 16MiB
concurrency: 3
sync-interval: 5s
busy-timeout: 2s
shutdown-sync-timeout: 1m
bucket: common
dbs:
  - path: /a.db
    replica: {path: a}
  - path: /b.db
    busy-timeout: 3s
    replica: {bucket: own, path: b, region: us, concurrency: 4, sync-interval: 10ms}
  - path: /c.db
    replica: {url: "s3://other/c?region=url"}
  - path: /d.db
    replica: {url: file:///backup/d}
"""
    a, b, c, d = load(text).databases
    assert (store_of(a).bucket, store_of(a).path, store_of(a).region) == ("common", "a", "eu")
    assert (store_of(a).part_size, store_of(a).concurrency) == (16 * 1024 * 1024, 3)
    assert a.replica is not None
    assert a.replica.sync_interval_s == 5.0
    assert (a.busy_timeout_s, a.shutdown_sync_timeout_s) == (2.0, 60.0)
    assert (store_of(b).bucket, store_of(b).region, store_of(b).concurrency) == ("own", "us", 4)
    assert b.replica is not None
    assert b.replica.sync_interval_s == 0.01
    assert b.busy_timeout_s == 3.0
    assert (store_of(c).bucket, store_of(c).path, store_of(c).region) == ("other", "c", "url")
    assert d.replica is not None
    assert d.replica.store == LocalSettings(path=Path("/backup/d"))


def test_forms_of_the_replica(load: Load) -> None:
    """A replica is a mapping, a URL, or the only entry of the old list."""
    text = """
dbs:
  - path: /a.db
    replica: s3://b/a
  - path: /b.db
    replicas:
      - url: s3://b/b
  - path: sqlite:///c.db
    replica: {path: /backup/c}
"""
    a, b, c = load(text).databases
    assert store_of(a).path == "a"
    assert store_of(b).path == "b"
    assert c.path == Path("/c.db")
    assert c.replica is not None
    assert c.replica.store == LocalSettings(path=Path("/backup/c"))


def test_database_keys(load: Load) -> None:
    """The keys of a database arrive, in Litestream's spelling and ours."""
    text = """
dbs:
  - path: /a.db
    meta-path: /meta
    busy_timeout: 250ms
    restore-if-db-not-exists: false
    max-sync-wal-bytes: 1MiB
    page-encoding: frame
    max-spool-bytes: 10MB
    min-checkpoint-page-count: 10
    replica: s3://b/a
"""
    (database,) = load(text).databases
    assert database.meta_path == Path("/meta")
    assert database.busy_timeout_s == 0.25
    assert database.restore == "never"
    assert database.max_sync_wal_bytes == 1024 * 1024
    assert database.page_encoding == "frame"
    assert database.max_spool_bytes == 10 * 1000 * 1000
    assert database.min_checkpoint_page_count == 10


def test_values_stay_as_written(load: Load) -> None:
    """YAML's surprises (no, octal numbers, sexagesimals) do not reach text settings."""
    text = """
dbs:
  - path: /a.db
    replica: {bucket: b, path: 010, region: no, storage-class: 1:30}
"""
    store = store_of(load(text).databases[0])
    assert (store.path, store.region, store.storage_class) == ("010", "no", "1:30")


def test_anchors_and_merge_keys(load: Load) -> None:
    """Anchors and merge keys work."""
    text = """
x-common: &common
  region: eu
dbs:
  - path: /a.db
    replica:
      <<: *common
      bucket: b
"""
    assert store_of(load(text).databases[0]).region == "eu"


def test_expansion(load: Load) -> None:
    """Variables are expanded within values, so that a secret may hold anything."""
    text = """
access-key-id: $KEY
secret-access-key: ${SECRET}
dbs:
  - path: ${DIR}/a-$PID.db
    replica: {bucket: b, path: a}
"""
    environ = {"KEY": "id", "SECRET": "a: b # c $KEY ${KEY} 'd", "DIR": "/data"}
    (database,) = load(text, environ).databases
    assert store_of(database).secret_access_key == environ["SECRET"]
    assert database.path.parent == Path("/data")
    assert database.path.stem.removeprefix("a-").isdigit()


def test_expansion_of_structure(load: Load) -> None:
    """A variable may also hold a piece of YAML."""
    text = "dbs: [{path: /a.db, replica: {url: ${URL}}}]"
    assert store_of(load(text, {"URL": "s3://b/x"}).databases[0]).path == "x"


def test_undefined_variables(load: Load) -> None:
    """What is not set is empty, and an error where it would name the wrong place."""
    text = "region: ${NOWHERE}\ndbs:\n  - path: /a.db\n    replica: {bucket: b, path: a}\n"
    assert store_of(load(text).databases[0]).region is None
    for line in ("bucket: ${X}", "bucket: b$X", "path: a/${X}", "url: s3://b/$X"):
        with pytest.raises(ConfigError, match="the variable X is not set"):
            load(f"dbs:\n  - path: /a.db\n    replica:\n      {line}\n")
    with pytest.raises(ConfigError, match="the variable X is not set"):
        load("dbs:\n  - path: $X/a.db\n    replica: s3://b\n")
    with pytest.raises(ConfigError, match=r"only \$\{NAME\} is expanded"):
        load("region: ${X:-eu}\n")


def test_no_expansion(load: Load) -> None:
    """Without expansion a dollar sign is a dollar sign."""
    text = "dbs:\n  - path: /a.db\n    replica: {bucket: b, path: $X}\n"
    assert store_of(load(text, {"X": "y"}, expand_env=False).databases[0]).path == "$X"


def test_unknown_keys_are_warned_about(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """An unknown key at any level is a warning that names the nearest known one."""
    text = """
regoin: eu
dbs:
  - path: /a.db
    bussy-timeout: 1s
    replica: {bucket: b, path: a, sync-intervall: 1s}
logging: {levle: debug}
"""
    with caplog.at_level(logging.WARNING):
        load(text)
    said = sorted(record.getMessage() for record in caplog.records)
    assert [text.partition("(")[2] for text in said] == [
        "did you mean busy-timeout?)",
        "did you mean level?)",
        "did you mean region?)",
        "did you mean sync-interval?)",
    ]


def test_strict(load: Load) -> None:
    """-strict makes an unknown key an error; what is known not to be needed is none."""
    text = "addr: :9090\ndbs:\n  - {path: /a.db, monitor-interval: 1s, replica: s3://b/a}\n"
    assert load(text, strict=True).databases
    for place in ("regoin: eu\n", "logging: {levle: debug}\n"):
        with pytest.raises(ConfigError, match=r"unknown setting .* \(did you mean"):
            load(place + text, strict=True)
    with pytest.raises(ConfigError, match=r"dbs\[1\]: replica: unknown setting 'regoin'"):
        load("dbs:\n  - {path: /a.db, replica: {url: s3://b, regoin: eu}}\n", strict=True)


def test_misplaced_keys(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """A setting one level too high or too low is a warning that says where it belongs."""
    text = """
dbs:
  - path: /a.db
    region: eu
    replica: {bucket: b, path: a, busy-timeout: 1s}
"""
    with caplog.at_level(logging.WARNING):
        load(text)
    assert [record.getMessage() for record in caplog.records] == [
        "unknown-key key=region where=a database (it belongs to a replica)",
        "unknown-key key=busy-timeout where=a replica (it belongs to a database)",
    ]


def test_each_key_is_mentioned_once(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """With a hundred databases, what is to be said about their keys is still said once."""
    entry = "  - {path: /N.db, monitor-interval: 1s, nonsense: 1, replica: s3://b/N}\n"
    text = "dbs:\n" + "".join(entry.replace("N", str(number)) for number in range(100))
    with caplog.at_level(logging.INFO):
        assert len(load(text).databases) == 100
    assert len(caplog.records) == 2


def test_of_the_whole_program(load: Load) -> None:
    """What the sidecar needs is read: where to serve metrics, which command to run."""
    settings = load("addr: 127.0.0.1:9090\nexec: gunicorn app:app\n")
    assert (settings.addr, settings.exec) == ("127.0.0.1:9090", "gunicorn app:app")
    assert load("addr: '[::1]:9090'\n").addr == "[::1]:9090"
    assert (load("").addr, load("").exec) == (None, None)


def test_heartbeat(load: Load) -> None:
    """A heartbeat has a URL, which may be a secret, and an interval."""
    settings = load("heartbeat-url: https://hc-ping.com/hunter2\nheartbeat_interval: 2m\n")
    assert settings.heartbeat_url == "https://hc-ping.com/hunter2"
    assert settings.heartbeat_interval_s == 120.0
    assert "hunter2" not in repr(settings)
    assert (load("").heartbeat_url, load("").heartbeat_interval_s) == (None, 300.0)


def test_secrets_stay_secret(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """Keys and tokens are in no repr, log or error, whatever is wrong around them."""
    text = """
secret-access-key: hunter2
access-key-id: id
session-token: hunter2
nonsense: hunter2
dbs:
  - path: /a.db
    replica: {bucket: b, path: a, secret-key: hunter2, password: hunter2}
"""
    with caplog.at_level(logging.DEBUG):
        settings = load(text)
    assert store_of(settings.databases[0]).secret_access_key == "hunter2"
    said = [repr(settings), *(record.getMessage() for record in caplog.records)]
    assert len(said) == 4, "nonsense, secret-key, password"
    for wrong in (
        "secret-access-key: hun$hunter2\n",
        "secret-access-key: ${hunter2-}\n",
        "secret-access-key: {a: hunter2}\n",
        "secret-access-key: ['hunter2']\n",
        'secret-access-key: "hunter2\\n"\ndbs: 1\n',
        "sse-customer-key: hunter2\n",
        "session-token: hunter2\n",
    ):
        caplog.clear()
        try:
            load(wrong + "dbs: [{path: /a.db, replica: {bucket: b, path: a}}]\n")
        except ConfigError as error:
            said += traceback.format_exception(error)
        said += [record.getMessage() for record in caplog.records]
    assert not [text for text in said if "hunter" in text]


def test_undefined_secrets(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """A variable that is not set where that may be meant is empty, with a warning."""
    load("access-key-id: ${NO_KEY}\nsecret-access-key: ${NO_SECRET}\n")
    assert [record.getMessage() for record in caplog.records] == [
        "variable-not-set key=access-key-id name=NO_KEY",
        "variable-not-set key=secret-access-key name=NO_SECRET",
    ]


def test_litestreams_own_keys(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """Litestream's keys without effect here are accepted at their places and mentioned."""
    text = """
addr: :9090
dbs:
  - path: /a.db
    monitor-interval: 1s
    replica: {bucket: b, path: a, validation-interval: 6h}
"""
    with caplog.at_level(logging.INFO):
        (database,) = load(text).databases
    assert database.validation_interval_s == 6 * 3600
    assert {record.getMessage().split()[1] for record in caplog.records} == {
        "key=monitor-interval",
    }


def test_validation_section(load: Load) -> None:
    """Litestream's section, of one database or of all; and what is wrong in it."""
    text = "validation: {interval: 6h}\ndbs: [{path: /a.db, replica: {path: a}}]"
    assert load(text).databases[0].validation_interval_s == 6 * 3600
    text = "validation-interval: 1h\ndbs: [{path: /a.db, replica: {path: a}, %s}]"
    assert load(text % "").databases[0].validation_interval_s == 3600
    assert load(text % "validation-interval: 2h").databases[0].validation_interval_s == 7200
    with pytest.raises(ConfigError, match="validation"):
        load(text % "validation: {every: 2h}")


def test_levels_as_litestream_has_them(load: Load) -> None:
    """Global sections are defaults; a database may have its own."""
    text = """
levels: [{interval: 10s}, {interval: 2m}]
snapshot: {interval: 12h, retention: 72h}
l0-retention: 1m
l0-retention-check-interval: 5s
retention: {enabled: false}
dbs:
  - path: /a.db
    replica: s3://b/a
  - path: /b.db
    levels: []
    snapshot: {interval: 1h}
    snapshot-retention: 4h
    retention: true
    replica: s3://b/b
"""
    first, second = load(text).databases
    assert first.levels == LevelSettings(
        intervals_s=(10.0, 120.0),
        snapshot_interval_s=12 * 3600.0,
        snapshot_retention_s=72 * 3600.0,
        l0_retention_s=60.0,
        l0_retention_check_interval_s=5.0,
        retention=False,
    )
    assert second.levels == LevelSettings(
        intervals_s=(),
        snapshot_interval_s=3600.0,
        snapshot_retention_s=4 * 3600.0,
        l0_retention_s=60.0,
        l0_retention_check_interval_s=5.0,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("levels: 30s", "a list of intervals"),
        ("levels: [30s, 10s]", "no less than the level below"),
        ("levels: [{every: 30s}]", "`interval`, and nothing else"),
        ("levels: [1m, 1m, 1m, 1m, 1m, 1m, 1m, 1m, 1m]", "8 at most"),
        ("snapshot: 24h", "expected below it"),
        ("snapshot: {every: 24h}", "every is unknown"),
        ("snapshot: {interval: 1ms}", "at least 1s"),
        ("retention: {disabled: true}", "`enabled`, and nothing else"),
        ("retention: perhaps", "neither true nor false"),
        ("l0-retention: 10s", "at least as long as fence-lease"),
        ("l0-retention-check-interval: 0s", "at least 1s"),
    ],
)
def test_levels_that_cannot_be(load: Load, text: str, says: str) -> None:
    """Each mistake has one clear error."""
    with pytest.raises(ConfigError, match=says):
        load(f"{text}\ndbs:\n  - path: /a.db\n    replica: s3://b/a\n")


def test_logging_section(load: Load) -> None:
    """The logging section is read."""
    text = "logging: {level: DEBUG, type: json, stderr: false, source: yes}\n"
    assert load(text).logging == LoggingSettings(
        level="debug", type="json", stderr=False, source=True
    )
    assert load("").logging == LoggingSettings()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dbs: {path: /a.db}", "dbs: a list"),
        ("dbs:\n  - /a.db", r"dbs\[1\]: `path: ` is missing"),
        ("dbs:\n  - 5: 6", r"dbs\[1\]: path is missing"),
        ("- a", "write `dbs:` before it"),
        ("a", "settings are expected"),
        ("a: b\0", r"U\+0000"),
        ("a: b\n---\na: c", "single document"),
        ("dbs:\n  - replica: s3://b", r"dbs\[1\]: path is missing"),
        ("dbs:\n  - path: /a.db", r"dbs\[1\]: replica is missing"),
        ("dbs:\n  - {path: /a.db, replica: s3://b, replicas: [s3://c]}", "both given"),
        ("dbs:\n  - {path: /a.db, replicas: [s3://b, s3://c]}", "exactly one"),
        ("dbs:\n  - {path: /a.db, replica: {url: s3://b, bucket: c}}", "url and bucket"),
        ("dbs:\n  - {dir: /x, replica: s3://b}", r"dbs\[1\]: pattern is missing"),
        ("dbs:\n  - {dir: /x, path: /y, pattern: '*', replica: s3://b}", "path and dir"),
        (
            "dbs:\n  - {path: /x, watch: true, replica: s3://b}",
            "watch: it belongs to an entry with",
        ),
        ("dbs:\n  - {dir: /x, pattern: 'a/*.db', replica: s3://b}", "recursive: true"),
        ("dbs:\n  - {dir: /x, pattern: '*.{db,sqlite}', replica: s3://b}", "an entry of its own"),
        ("dbs:\n  - {dir: /x, pattern: '*', meta-dir: /m, meta-path: /n, replica: s3://b}", "both"),
        ("dbs:\n  - {dir: /x, pattern: '*', page-size: 7, replica: s3://b}", "page-size"),
        ("dir: /x", "belongs to a database"),
        ("addr: 9090", "addr: not an address"),
        ("heartbeat-interval: 59s", "heartbeat-interval: must be at least 1m"),
        ("heartbeat-url: hc-ping.com/x", "heartbeat-url: a URL that begins with https://"),
        ("heartbeat-url: file:///etc/passwd", "heartbeat-url: a URL that begins with https://"),
        ("heartbeat-url: ftp://host/x", "heartbeat-url: a URL that begins with https://"),
        ("heartbeat-url: 'https://'", "heartbeat-url: a URL that begins with https://"),
        ("heartbeat-url: 'https://a:b/'", "heartbeat-url: a URL that begins with https://"),
        ("heartbeat-url: 'https://a b/'", "heartbeat-url: a URL that begins with https://"),
        ("addr: ':70000'", "addr: not an address"),
        ("dbs: []\nregion: eu\ndbs: []", "dbs is given twice"),
        ("busy-timeout: 1s\nbusy_timeout: 2s", "busy-timeout is given twice"),
        ("a: &a [*a]", "nested too deeply"),
        ("dbs:\n  - {path: /a.db, replica: {bucket: b, age: {}}}", "encryption"),
        (
            "dbs:\n  - {path: /a.db, replica: {type: gs, bucket: b}}",
            "type: gs is not supported: use s3://",
        ),
        ("dbs:\n  - {path: /a.db, busy-timeout: soon, replica: s3://b}", r"dbs\[1\]: busy-timeout"),
        ("url: s3://b", "belongs to a database"),
        (
            "dbs:\n  - {path: /a.db, replica: s3://b/x}\n  - {path: /b.db, replica: s3://b/x}",
            "same replica",
        ),
        (
            "dbs:\n  - {path: /a.db, replica: s3://b/x}\n  - {path: /a.db, replica: s3://b/y}",
            "listed twice",
        ),
        ("a: [", "not YAML"),
        ("a: b: c", "not YAML"),
        ("a: {url: s3://b?region=eu}", "needs quotes"),
        ("a: !!python/object:os.system x", "not YAML"),
        ("logging: {level: loud}", "logging.level"),
    ],
)
def test_refusals(load: Load, text: str, says: str) -> None:
    """What cannot be used is one line that names file, place and setting."""
    with pytest.raises(ConfigError, match=says) as caught:
        load(text)
    assert "walship.yml" in str(caught.value)
    assert "\n" not in str(caught.value)


FILE = """\
addr: :9090
logging:
  level: info
dbs:
  - path: /a.db
    shutdown_sync_timeout: 5s
    replica:
      bucket: b
      secret-access-key: tsec_SECRET
      access-key-id: tid
  - path: /b.db
    replica: s3://b/b
"""


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (":9090", "nine", 1),
        ("level: info", "level: loud", 3),
        ("dbs:", "dbs: 5 #", None),
        ("/b.db", "/a.db", 11),
        ("s3://b/b", "s3://b", 11),
        ("s3://b/b", "s3://b/b?reggion=x", 12),
        ("5s", "-5s", 6),
        ("5s", "5 parsecs", 6),
        ("bucket: b", "bucket: [b]", 8),
        ("access-key-id: tid", "endpoint: https://me:tsec_SECRET@host", 10),
        ("access-key-id: tid", "region: eu", 7),
        ("access-key-id: tid", "reggion: eu", 10),
        ("tsec_SECRET", "[tsec_SECRET]", 9),
        ("tsec_SECRET", "'tsec_SECRET", 13),
    ],
)
def test_errors_name_the_line(load: Load, old: str, new: str, line: int | None) -> None:
    """Each says where in the file it is, and shows no secret."""
    assert len(load(FILE, strict=True).databases) == 2
    with pytest.raises(ConfigError) as caught:
        load(FILE.replace(old, new, 1), strict=True)
    if line is not None:
        assert str(caught.value).endswith(f"(line {line})")
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


def test_anchors_of_anchors(load: Load) -> None:
    """A text that would become enormous is read in no time, and keys of one's own hold anchors."""
    names = "abcdefghij"
    rows = ["x-a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for before, name in itertools.pairwise(names):
        rows.append(f"x-{name}: &{name} [{', '.join(['*' + before] * 10)}]")
    assert load("\n".join([*rows, FILE]), strict=True).databases == load(FILE).databases


def test_yaml_errors_do_not_show_the_line(load: Load) -> None:
    """A line that cannot be parsed may hold a secret; a traceback does not show it either."""
    secret = "hunter{}"
    with pytest.raises(ConfigError, match="line 1") as caught:
        load(f"secret-access-key: {secret.format(2)}: x\n")
    assert secret.format(2) not in "".join(traceback.format_exception(caught.value))


def test_unreadable_files(tmp_path: Path) -> None:
    """A file that is missing or no text is a ConfigError."""
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yml", environ={})
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "binary.yml", environ={})


def test_finding_a_database(load: Load, tmp_path: Path) -> None:
    """A database is found by its path, also through a symbolic link."""
    target = tmp_path / "real.db"
    target.touch()
    link = tmp_path / "link.db"
    link.symlink_to(target)
    settings = load(f"dbs:\n  - path: {target}\n    replica: s3://b/x\n")
    assert settings.database(target) is settings.databases[0]
    assert settings.database(link) is settings.databases[0]
    assert settings.database(tmp_path / "other.db") is None
