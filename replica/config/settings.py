"""The settings themselves: their names, how each is read, which values fit together.

Values come in as plain mappings by hyphenated name; ``sources`` collects them from keywords, files
and the environment.  Reads no environment and no file (but a key file that a setting names).
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

from walship.replica.errors import ConfigError
from walship.replica.format.types import is_page_size
from walship.replica.store.settings import (
    DEFAULT_PART_SIZE,
    LocalSettings,
    S3Settings,
    StoreSettings,
)

from .levels import (
    LEVEL_KEYS,
    LevelSettings,
    level_settings,
)
from .url import (
    UNSUPPORTED,
    clean_path,
    is_private_host,
    is_url,
    normalize_endpoint,
    parse_url,
    provider_of,
    region_of,
)
from .values import (
    nearest,
    parse_bool,
    parse_choice,
    parse_duration,
    parse_int,
    parse_size,
    parse_text,
)

__all__ = [
    "DATABASE_KEYS",
    "REFUSED",
    "REPLICA_KEYS",
    "WITHOUT_EFFECT",
    "DatabaseSettings",
    "Parser",
    "Remarks",
    "ReplicaSettings",
    "absolute",
    "database_file",
    "database_path",
    "known_values",
    "make_database",
    "make_replica",
    "state_name",
]

_log = logging.getLogger(__name__)

_MIB: Final = 1024 * 1024
_MAX_PART_SIZE: Final = 5 * 1024 * _MIB  # S3's own limit
_MAX_BUSY_TIMEOUT_S: Final = 2_147_483  # SQLite counts milliseconds in 32 bits


Parser = Callable[[str, object], object]


def _parse_type(name: str, value: object) -> str:
    text = parse_text(name, value).lower()
    if text in UNSUPPORTED:
        raise ConfigError(f"{name}: {text} is not supported: {UNSUPPORTED[text]}")
    return parse_choice("s3", "file")(name, text)


def _parse_validation(name: str, value: object) -> float:
    """Seconds: of Litestream's section with ``interval`` in it, or of a duration."""
    if isinstance(value, Mapping):
        if set(value) != {"interval"}:
            raise ConfigError(f"{name}: a section with `interval`, and nothing else, is expected")
        value = value["interval"]
    return parse_duration(name, value)


#: Settings of a replica and how each is read.
REPLICA_KEYS: Final[Mapping[str, Parser]] = {
    "type": _parse_type,
    "url": parse_text,
    "path": parse_text,
    "bucket": parse_text,
    "endpoint": parse_text,
    "region": parse_text,
    "access-key-id": parse_text,
    "secret-access-key": parse_text,
    "session-token": parse_text,
    "profile": parse_text,
    "force-path-style": parse_bool,
    "skip-verify": parse_bool,
    "ca-bundle": parse_text,
    "sign-payload": parse_bool,
    "require-content-md5": parse_bool,
    "tigris-consistent": parse_bool,
    "part-size": parse_size,
    "concurrency": parse_int,
    "storage-class": parse_text,
    "sse-customer-algorithm": parse_text,
    "sse-customer-key": parse_text,
    "sse-customer-key-path": parse_text,
    "sse-kms-key-id": parse_text,
    "connect-timeout": parse_duration,
    "read-timeout": parse_duration,
    "max-connections": parse_int,
    "sync-interval": parse_duration,
}

#: Settings of a database and how each is read.
DATABASE_KEYS: Final[Mapping[str, Parser]] = {
    "path": parse_text,
    "meta-path": parse_text,
    "restore": parse_choice("if-missing", "never"),
    "restore-if-db-not-exists": parse_bool,
    "busy-timeout": parse_duration,
    "open-timeout": parse_duration,
    "shutdown-sync-timeout": parse_duration,
    "max-sync-wal-bytes": parse_size,
    "page-size": parse_int,
    "page-encoding": parse_choice("block", "frame"),
    "adopt": parse_bool,
    "spool-full": parse_choice("resync", "block", "fail"),
    "spool-full-timeout": parse_duration,
    "min-checkpoint-page-count": parse_int,
    "max-spool-bytes": parse_size,
    "durability": parse_choice("async", "replica"),
    "durability-timeout": parse_duration,
    "fence": parse_choice("auto", "required", "off"),
    "fence-wait": parse_duration,
    "fence-lease": parse_duration,
    "on-fenced": parse_choice("refuse", "local"),
    "validation": _parse_validation,
    "validation-interval": parse_duration,
    **LEVEL_KEYS,
}

#: Of Litestream's other types of replica; some stand at a file's top level, as defaults.
_OF_OTHER_TYPES: Final = (
    *("account-name", "account-key", "sas-token"),
    *("host", "user", "password", "key-path", "host-key", "concurrent-writes"),
    *("webdav-url", "webdav-username", "webdav-password"),
    *("jwt", "seed", "creds", "nkey", "username", "token", "tls", "root-cas", "client-cert"),
    *("client-key", "max-reconnects", "reconnect-wait", "timeout"),
)

#: Settings that are accepted, because Litestream has them, and change nothing.
WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "auto-recover": "pages are compared and what differs is shipped, without being asked",
    "checkpoint-interval": "checkpoints go by pages (min-checkpoint-page-count)",
    "max-checkpoint-page-count": "checkpoints that block readers are not used",
    "max-sync-ltx-files": "pending segments are merged before they are sent",
    "mcp-addr": "there is no MCP server",
    "monitor-interval": "commits are seen as they happen (from beside: within 0.5 s)",
    "name": "a database has one replica",
    "retention-check-interval": "snapshots are removed as soon as they may be",
    "shutdown-sync-interval": "failed uploads are repeated with growing pauses",
    "sse-customer-key-md5": "the digest is computed from the key",
    "truncate-page-n": "the log is begun anew long before it is that long",
    "verify-compaction": "inputs and results are always verified",
    **dict.fromkeys(_OF_OTHER_TYPES, "of a type of replica that is not supported"),
}

#: Keys that cannot be passed over: they would leave data without replica or without encryption.
REFUSED: Final[Mapping[str, str]] = {
    "age": "client-side encryption is not supported: remove it (sse-kms-key-id and "
    "sse-customer-key encrypt in the store)",
}


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """Where a database is replicated to, and how eagerly.

    Attributes:
        store: for ``store.opening.open_store``.
        sync_interval_s: seconds between uploads under load; an idle replica sends at once.
    """

    store: StoreSettings
    sync_interval_s: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DatabaseSettings:
    """One database.

    Attributes:
        path: the database file, absolute.
        meta_path: directory for local state.
        replica: where to replicate to, or None.
        restore: fetch a missing database from its replica before opening it, or not.
        busy_timeout_s: SQLite's own, for connections made by ``connect``.
        open_timeout_s: how long opening waits for the replica's answer, seconds.
        shutdown_sync_timeout_s: how long the last close waits for uploads, seconds.
        max_sync_wal_bytes: WAL bytes that go into one segment unless a single transaction is
            larger; 0 for no limit.
        page_size: for databases that are made new, or None for SQLite's default.
        page_encoding: how pages are written; "frame" is read by releases before Litestream 0.5.16.
        adopt: where database and replica do not continue each other, let the database become the
            replica's next state instead of refusing.
        spool_full: what a checkpoint does when the local spool cannot be written: "resync" lets
            the WAL go and ships a full copy later, "block" waits, then fails, "fail" fails.
        spool_full_timeout_s: how long "block" waits, seconds.
        max_spool_bytes: how large the local spool may grow before it counts as full; 0: no limit.
        min_checkpoint_page_count: WAL pages from which on a commit also checkpoints; SQLite's
            ``wal_autocheckpoint`` of connections made by ``connect``.
        durability: "replica" makes each commit of a connection made by ``connect`` wait until the
            replica has it; "async" returns at once.
        durability_timeout_s: how long such a commit waits before `NotYetReplicated`, seconds.
        fence: "auto" keeps second writers out where the store can, "required" refuses a store that
            cannot, "off" does not try.
        fence_wait_s: how long opening waits for another host to give up the replica, seconds.
        fence_lease_s: how long after its last sign of life a crashed owner keeps others out,
            seconds.
        on_fenced: when another host owns the replica: "refuse" fails commits, "local" lets them
            happen here without a replica.
        validation_interval_s: how often the replica is restored for trial and compared with the
            database, in the background, seconds; 0: never.
        levels: how segments are merged, how often snapshots are made, how long all is kept.
    """

    path: Path
    meta_path: Path
    replica: ReplicaSettings | None = None
    restore: Literal["if-missing", "never"] = "if-missing"
    busy_timeout_s: float = 5.0
    open_timeout_s: float = 10.0
    shutdown_sync_timeout_s: float = 30.0
    max_sync_wal_bytes: int = 64 * _MIB
    page_size: int | None = None
    page_encoding: Literal["block", "frame"] = "block"
    adopt: bool = False
    spool_full: Literal["resync", "block", "fail"] = "resync"
    spool_full_timeout_s: float = 30.0
    max_spool_bytes: int = 0
    min_checkpoint_page_count: int = 1000
    durability: Literal["async", "replica"] = "async"
    durability_timeout_s: float = 30.0
    fence: Literal["auto", "required", "off"] = "auto"
    fence_wait_s: float = 0.0
    fence_lease_s: float = 30.0
    on_fenced: Literal["refuse", "local"] = "refuse"
    validation_interval_s: float = 0.0
    levels: LevelSettings = field(default_factory=LevelSettings)


# --- names ----------------------------------------------------------------------------------------


class Remarks:
    """What is to be said about the names of settings in one source; each thing is said once.

    Args:
        strict: an unknown name is an error, not a warning.
    """

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._said: set[tuple[str, str]] = set()

    def pass_over(self, key: str, known: Iterable[str], where: str) -> None:
        """Say something about a setting that is none of those ``known`` in this place.

        Args:
            where: what it was found in, for people: "a replica".

        Raises:
            ConfigError: it cannot be passed over.
        """
        if key in REFUSED:
            raise ConfigError(f"{key}: {REFUSED[key]}")
        if key in WITHOUT_EFFECT:
            self.without_effect(key)
            return
        hint = _where_it_belongs(key) or nearest(key, known)
        if self._strict:
            raise ConfigError(f"unknown setting {key!r} in {where}{hint}")
        if self._is_news(key, where):
            _log.warning("unknown-key key=%s where=%s%s", key, where, hint)

    def without_effect(self, key: str) -> None:
        """Say that a setting of Litestream's changes nothing here, and why."""
        reason = WITHOUT_EFFECT[key]
        if self._is_news(key, ""):
            _log.info("setting-without-effect key=%s reason=%s", key, reason)

    def _is_news(self, key: str, where: str) -> bool:
        news = (key, where) not in self._said
        self._said.add((key, where))
        return news


def _where_it_belongs(key: str) -> str:
    """`` (it belongs ...)`` for a setting that is known elsewhere, or nothing."""
    if key in REPLICA_KEYS:
        return " (it belongs to a replica)"
    return " (it belongs to a database)" if key in DATABASE_KEYS else ""


# --- replicas ------------------------------------------------------------------------------------


def known_values(given: Mapping[str, object], what: str, remarks: Remarks) -> dict[str, object]:
    """Settings of a replica by hyphenated name, read; empty ones and those without effect are left
    out.

    Args:
        what: where they come from, for people: "a replica".
    """
    values: dict[str, object] = {}
    for key, value in given.items():
        name = str(key).replace("_", "-")
        parser = REPLICA_KEYS.get(name)
        if parser is None:
            remarks.pass_over(name, REPLICA_KEYS, what)
        elif name in values:
            raise ConfigError(f"{name} is given twice")
        elif isinstance(value, os.PathLike):
            values[name] = parser(name, os.fspath(value))
        elif value is not None and value != "":
            values[name] = parser(name, value)
    return values


def make_replica(
    given: Mapping[str, object],
    defaults: Mapping[str, object],
    variables: Mapping[str, str],
) -> ReplicaSettings:
    fields = dict(given)
    url = fields.pop("url", None)
    from_url: Mapping[str, object] = {}
    if url is not None:
        text = str(url)
        if not text:
            raise ConfigError("url: it is empty")
        for name in ("bucket", "path"):
            if name in fields:
                raise ConfigError(f"url and {name} are both given: keep one of them")
        if is_url(text):
            from_url = {
                name: REPLICA_KEYS[name](name, value)
                for name, value in parse_url(text).items()
                if name in REPLICA_KEYS and value != ""
            }
        else:
            from_url = {"type": "file", "path": parse_text("path", text)}
        if fields.setdefault("type", from_url["type"]) != from_url["type"]:
            raise ConfigError(f"type: {fields['type']} does not fit the URL")
        # A global bucket or path is for replicas that name none themselves.
        defaults = {
            name: value
            for name, value in defaults.items()
            if name not in ("bucket", "path", "type")
        }
    values = {**defaults, **from_url, **fields}
    kind = values.pop("type", None)
    if kind is None:
        kind = "s3" if "bucket" in values else "file"
        if kind == "file" and "path" not in values:
            raise ConfigError("where to? give a url, a bucket, or the path of a directory")
    store = _s3(values, variables) if kind == "s3" else _local(values, fields)
    more = {}
    if "sync-interval" in values:
        more["sync_interval_s"] = cast("float", values["sync-interval"])
    return ReplicaSettings(store=store, **more)


def _local(values: Mapping[str, object], fields: Mapping[str, object]) -> LocalSettings:
    for name in fields:
        if name not in ("type", "path", "sync-interval"):
            raise ConfigError(f"{name}: not a setting of a replica in a directory")
    path = values.get("path")
    if not path:
        raise ConfigError("path: which directory?")
    return LocalSettings(path=absolute(str(path)))


def _s3(values: Mapping[str, object], variables: Mapping[str, str]) -> S3Settings:
    text = cast("Mapping[str, str]", values)
    bucket = text.get("bucket") or variables.get("BUCKET_NAME")
    if not bucket:
        raise ConfigError("bucket: which one? (s3://BUCKET/PATH, or the variable BUCKET_NAME)")
    if "/" in bucket and not bucket.startswith("arn:"):
        raise ConfigError(f"bucket: {bucket!r} has a slash in it; the rest belongs into `path`")
    written = text.get("path", "")
    path = clean_path(written)
    if ".." in path.split("/"):
        raise ConfigError(f"path: {written!r} has '..' in it")
    endpoint: str | None = (
        text.get("endpoint")
        or variables.get("AWS_ENDPOINT_URL_S3")
        or variables.get("AWS_ENDPOINT_URL")
    )
    if endpoint:
        endpoint = normalize_endpoint(endpoint)
    provider = provider_of(endpoint or None)
    region = (
        text.get("region")
        or region_of(endpoint or None)
        or variables.get("AWS_REGION")
        or variables.get("AWS_DEFAULT_REGION")
        or provider.region
    )
    part_size = cast("int", values.get("part-size", DEFAULT_PART_SIZE))
    if 5_000_000 <= part_size < DEFAULT_PART_SIZE:  # "5MB" means S3's lower limit
        part_size = DEFAULT_PART_SIZE
    _check_range("part-size", part_size, DEFAULT_PART_SIZE, _MAX_PART_SIZE)
    concurrency = cast("int", values.get("concurrency", provider.concurrency or 5))
    _check_range("concurrency", concurrency, 1, 1000)
    max_connections = cast("int", values.get("max-connections", 64))
    _check_range("max-connections", max_connections, 1, 10_000)
    for name in ("connect-timeout", "read-timeout"):
        if values.get(name) == 0:
            raise ConfigError(f"{name}: must be above 0")
    trusted = (variables.get(name) for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE"))
    ca_bundle = text.get("ca-bundle") or next(filter(None, trusted), None)
    skip_verify = bool(values.get("skip-verify", False))
    return S3Settings(
        bucket=bucket,
        path=path,
        written_path=written if written not in ("", path) else None,
        endpoint=endpoint or None,
        region=region,
        force_path_style=bool(values.get("force-path-style", bool(endpoint))),
        skip_verify=skip_verify,
        ca_bundle=absolute(ca_bundle) if ca_bundle and not skip_verify else None,
        sign_payload=bool(values.get("sign-payload", True)),
        require_content_md5=bool(values.get("require-content-md5", provider.require_content_md5)),
        tigris_consistent=bool(values.get("tigris-consistent", provider.tigris_consistent)),
        part_size=part_size,
        concurrency=concurrency,
        max_connections=max_connections,
        storage_class=text.get("storage-class"),
        connect_timeout_s=cast("float", values.get("connect-timeout", 5.0)),
        read_timeout_s=cast("float", values.get("read-timeout", 30.0)),
        **_credentials(text, variables),
        **_encryption(text, endpoint or None),
    )


def _credentials(text: Mapping[str, str], variables: Mapping[str, str]) -> dict[str, Any]:
    key = text.get("access-key-id")
    secret = text.get("secret-access-key")
    if key or secret:
        if not (key and secret):
            missing = "secret-access-key" if key else "access-key-id"
            raise ConfigError(f"{missing} is missing: it comes with the other key")
        if text.get("profile"):
            raise ConfigError("profile and access-key-id are both given: keep one of them")
        return {
            "access_key_id": key,
            "secret_access_key": secret,
            "session_token": text.get("session-token"),
        }
    if text.get("session-token"):
        raise ConfigError("session-token: access-key-id and secret-access-key belong to it")
    if text.get("profile"):
        return {"profile": text["profile"]}
    aws_key, aws_secret = (
        variables.get("AWS_ACCESS_KEY_ID"),
        variables.get("AWS_SECRET_ACCESS_KEY"),
    )
    key = aws_key or variables.get("LITESTREAM_ACCESS_KEY_ID")
    secret = aws_secret or variables.get("LITESTREAM_SECRET_ACCESS_KEY")
    if key and secret:
        # A token belongs to the AWS_* keys only.
        token = variables.get("AWS_SESSION_TOKEN") if aws_key and aws_secret else None
        return {
            "access_key_id": key,
            "secret_access_key": secret,
            "session_token": token or None,
        }
    if key or secret:
        missing = "AWS_SECRET_ACCESS_KEY" if key else "AWS_ACCESS_KEY_ID"
        raise ConfigError(f"the variable {missing} is missing: it comes with the other key")
    return {"profile": variables.get("AWS_PROFILE") or None}


def _encryption(text: Mapping[str, str], endpoint: str | None) -> dict[str, Any]:
    encoded = text.get("sse-customer-key")
    key_path = text.get("sse-customer-key-path")
    kms = text.get("sse-kms-key-id")
    algorithm = text.get("sse-customer-algorithm")
    if encoded and key_path:
        raise ConfigError("sse-customer-key and sse-customer-key-path: keep one of them")
    if key_path:
        file = absolute(key_path)
        try:
            encoded = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not base64 text"
            raise ConfigError(f"sse-customer-key-path: cannot read {file}: {reason}") from error
    if not encoded:
        if algorithm:
            raise ConfigError("sse-customer-algorithm: sse-customer-key belongs to it")
        return {"sse_kms_key_id": kms}
    if kms:
        raise ConfigError("sse-kms-key-id and sse-customer-key: keep one of them")
    if algorithm not in (None, "AES256"):
        raise ConfigError("sse-customer-algorithm: only AES256 is known")
    try:
        key = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError("sse-customer-key: not base64") from error
    if len(key) != 32:
        raise ConfigError(f"sse-customer-key: 32 bytes are needed, it has {len(key)}")
    if endpoint is not None and endpoint.startswith("http://"):
        host = endpoint.removeprefix("http://").partition("/")[0]
        if not is_private_host(host.rpartition(":")[0] or host):
            raise ConfigError("sse-customer-key: an endpoint with https is needed")
    return {"sse_customer_algorithm": "AES256", "sse_customer_key": key}


# --- databases -----------------------------------------------------------------------------------


def make_database(
    path: str, replica: ReplicaSettings | None, values: Mapping[str, object]
) -> DatabaseSettings:
    file = database_path(path)
    more: dict[str, Any] = {"levels": level_settings(values)}
    for name, value in values.items():
        if name == "meta-path" or name in LEVEL_KEYS:
            continue
        attribute = name.replace("-", "_")
        if DATABASE_KEYS[name] is parse_duration:
            attribute += "_s"
        more[attribute] = value
    on_missing = more.pop("restore_if_db_not_exists", None)
    if on_missing is not None:
        more.setdefault("restore", "if-missing" if on_missing else "never")
    validation_s = more.pop("validation", None)
    if validation_s is not None:
        more.setdefault("validation_interval_s", validation_s)
    page_size = more.get("page_size")
    if page_size is not None and not is_page_size(page_size):
        raise ConfigError(f"page-size: {page_size} is not a power of two from 512 to 65536")
    if more.get("min_checkpoint_page_count", 1) < 1:
        raise ConfigError("min-checkpoint-page-count: must be at least 1")
    if not 2.0 <= more.get("fence_lease_s", 30.0) <= 120.0:
        raise ConfigError("fence-lease: must be from 2s to 2m")
    if more.get("busy_timeout_s", 0.0) > _MAX_BUSY_TIMEOUT_S:
        raise ConfigError(f"busy-timeout: {_MAX_BUSY_TIMEOUT_S} s at most")
    meta_path = values.get("meta-path")
    directory = absolute(str(meta_path)) if meta_path else file.parent / state_name(file.name)
    if directory == file:
        raise ConfigError(f"meta-path: {file} is the database itself")
    if replica is not None and isinstance(replica.store, LocalSettings):
        _check_apart(replica.store.path, file, directory)
    return DatabaseSettings(path=file, meta_path=directory, replica=replica, **more)


def state_name(name: str) -> str:
    """Of the directory beside a database file of this name, where its local state lies."""
    return f".{name}-walship"


def _check_apart(replica: Path, file: Path, directory: Path) -> None:
    """Refuse a replica that would lie in the database's own file or state."""
    if replica == file:
        raise ConfigError(f"replica: {replica} is the database itself: name a directory for it")
    if replica == directory or directory in replica.parents:
        raise ConfigError(
            f"replica: {replica} is the local state of {file.name}: name another directory for it"
        )


def database_path(path: str) -> Path:
    """A database's file, absolute; ``~`` and a ``sqlite://`` prefix are understood.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(path, str):
        raise ConfigError("path: text is expected")
    for prefix in ("sqlite3://", "sqlite://"):
        path = path.removeprefix(prefix)
    if not path or path == ":memory:" or "\0" in path:
        raise ConfigError(f"path: {path!r} is not a database file")
    if is_url(path) or path.startswith("file:"):
        raise ConfigError(f"path: {path!r} is a URL: a database is named by the path of its file")
    return absolute(path)


def database_file(path: str) -> Path:
    """As `database_path`, and no directory lies there.

    Raises:
        ConfigError: it is none.
    """
    file = database_path(path)
    if os.path.isdir(file):
        raise ConfigError(f"path: {file} is a directory, not a database file")
    return file


# --- small things --------------------------------------------------------------------------------


def absolute(path: str) -> Path:
    """The path from the root, with ``~`` expanded; links stay as they are."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}: {value} is not from {low} to {high}")
