"""What a configuration file says: its databases, directories and what concerns the whole program.

The tree that ``text`` made of it comes in, `Settings` go out.  Files have
Litestream's format; keys may be written with hyphens or underscores.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from walship.replica.errors import ConfigError
from walship.replica.store.settings import LocalSettings

from .directories import DIRECTORY_KEYS, DirectorySettings
from .settings import (
    DATABASE_KEYS,
    REFUSED,
    REPLICA_KEYS,
    WITHOUT_EFFECT,
    DatabaseSettings,
    Parser,
    Remarks,
    ReplicaSettings,
    absolute,
    database_file,
    database_path,
    known_values,
    make_database,
    make_replica,
)
from .values import (
    parse_address,
    parse_bool,
    parse_choice,
    parse_duration,
    parse_text,
    parse_web_url,
)

__all__ = [
    "GLOBAL_KEYS",
    "LOG_LEVELS",
    "SOCKET_PATH",
    "LoggingSettings",
    "Settings",
    "SocketSettings",
    "read_settings",
]

#: Where the control socket of ``walship replicate`` is made without a setting.
SOCKET_PATH: Final = "/var/run/walship.sock"
#: Litestream's limit: watchdogs are not to be flooded.
_LEAST_HEARTBEAT_S: Final = 60.0


def _parse_heartbeat_interval(name: str, value: object) -> float:
    interval_s = parse_duration(name, value)
    if interval_s < _LEAST_HEARTBEAT_S:
        raise ConfigError(f"{name}: must be at least 1m")
    return interval_s


@dataclass(frozen=True, kw_only=True)
class SocketSettings:
    """The ``socket`` section: the control socket of ``walship replicate``.

    Attributes:
        path: where it is made, or None for the default.
        permissions: its mode.
    """

    path: str | None = None
    permissions: int = 0o600


def _parse_socket(name: str, value: object) -> SocketSettings | None:
    values = {}
    for key, given in _section(value, name).items():
        if key not in ("enabled", "path", "permissions"):
            raise ConfigError(f"{name}: unknown setting {key!r}: enabled, path, permissions")
        values[key] = given
    permissions = values.get("permissions", 0o600)
    if isinstance(permissions, str):
        try:
            permissions = int(permissions, 8)
        except ValueError:
            permissions = -1
    if not isinstance(permissions, int) or not 0 <= permissions <= 0o777:
        raise ConfigError(f"{name}: permissions: octal digits are expected (0600)")
    path = values.get("path")
    settings = SocketSettings(
        path=None if path in (None, "") else parse_text(f"{name}: path", path),
        permissions=permissions,
    )
    return settings if parse_bool(f"{name}: enabled", values.get("enabled", False)) else None


#: Keys of a file's top level that concern the whole program, and how each is read.  Settings of
#: replicas and databases may stand there too: they are defaults.
GLOBAL_KEYS: Final[Mapping[str, Parser]] = {
    "addr": parse_address,
    "exec": parse_text,
    "heartbeat-url": parse_web_url,
    "heartbeat-interval": _parse_heartbeat_interval,
    "socket": _parse_socket,
}
#: Their fields in `Settings`, where those have another name.
_FIELDS: Final = {"heartbeat-url": "heartbeat_url", "heartbeat-interval": "heartbeat_interval_s"}
_SECTIONS: Final = ("dbs", "logging")
#: What ``level`` may be.
LOG_LEVELS: Final = ("trace", "debug", "info", "warn", "warning", "error")
_LOGGING_KEYS: Final[Mapping[str, Parser]] = {
    "level": parse_choice(*LOG_LEVELS),
    "type": parse_choice("text", "json", "pretty"),
    "stderr": parse_bool,
    "source": parse_bool,
}


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """The ``logging`` section; it is for programs that run on, never for an application's logging.

    Attributes:
        level: trace, debug, info, warn or error.
        type: text, json or pretty.
        stderr: log to standard error.
        source: name file and line.
    """

    level: str = "info"
    type: str = "text"
    stderr: bool = True
    source: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A configuration file.

    Attributes:
        databases: the ``dbs`` entries with a ``path``, in order.
        directories: those with a ``dir``, in order.
        logging: its ``logging`` section.
        addr: where metrics are to be served, ``host:port`` or ``:port``, or None.
        exec: the command that is to be run beside replication, or None.
        socket: the control socket, or None.
        heartbeat_url: where a GET is sent while replication is well, or None; may be a secret.
        heartbeat_interval_s: seconds between two of them.
    """

    databases: tuple[DatabaseSettings, ...] = ()
    directories: tuple[DirectorySettings, ...] = ()
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    addr: str | None = None
    exec: str | None = None
    socket: SocketSettings | None = None
    heartbeat_url: str | None = field(default=None, repr=False)
    heartbeat_interval_s: float = 300.0

    def database(self, path: str | os.PathLike[str]) -> DatabaseSettings | None:
        """The settings of a database file: its own entry, else the first directory it fits."""
        wanted = os.path.realpath(database_path(os.fspath(path)))
        for database in self.databases:
            if os.path.realpath(database.path) == wanted:
                return database
        for directory in self.directories:
            if found := directory.database(wanted):
                return found
        return None

    def all_databases(self) -> list[DatabaseSettings]:
        """Every database that there is now: those with an entry, then those in directories.

        Raises:
            ConfigError: two of them have the same replica.
        """
        found = {os.path.realpath(each.path): each for each in self.databases}
        for directory in self.directories:
            for database in directory.databases():
                found.setdefault(str(database.path), database)
        distinct = _Distinct()
        for database in found.values():
            distinct.add(database)
        return list(found.values())


def read_settings(tree: object, variables: Mapping[str, str], *, strict: bool = False) -> Settings:
    """Read a configuration file's tree.

    Unknown keys, and keys of Litestream's without effect here, are logged; each once.

    Args:
        variables: of the environment, for what replicas leave open.
        strict: an unknown key is an error.

    Raises:
        ConfigError: a setting that cannot be used; the message names the entry.
    """
    remarks = Remarks(strict=strict)
    if isinstance(tree, list):
        raise ConfigError("it begins with a list: write `dbs:` before it")
    top = _section(tree, "the file")
    values: dict[str, Any] = {}
    replica_defaults: dict[str, object] = {}
    database_defaults: dict[str, object] = {}
    for key, value in top.items():
        if key.startswith("x-"):
            continue  # the user's own, for anchors
        if key in ("url", "meta-path") or key in DIRECTORY_KEYS:
            raise ConfigError(f"{key}: it belongs to a database, below dbs")
        for parsers, found in (
            (GLOBAL_KEYS, values),
            (REPLICA_KEYS, replica_defaults),
            (DATABASE_KEYS, database_defaults),
        ):
            if key in parsers and value is not None and value != "":
                found[key] = parsers[key](key, value)
        known = (*_SECTIONS, *GLOBAL_KEYS, *REPLICA_KEYS, *DATABASE_KEYS)
        if key not in known or key in WITHOUT_EFFECT:
            remarks.pass_over(key, known, "the top level")
    entries = top.get("dbs") or []
    if not isinstance(entries, list):
        raise ConfigError("dbs: a list is expected (each entry begins with '-')")
    databases, directories = [], []
    distinct = _Distinct()
    reader = _EntryReader(replica_defaults, database_defaults, variables, remarks)
    for number, entry in enumerate(entries, 1):
        try:
            if isinstance(entry, str):
                raise ConfigError("`path: ` is missing before the database file")
            section = _section(entry, "an entry of dbs")
            if "dir" in section:
                directories.append(reader.directory(section))
            else:
                databases.append(reader.database(section))
                distinct.add(databases[-1])
        except ConfigError as error:
            raise ConfigError(f"dbs[{number}]: {error}") from error
    return Settings(
        databases=tuple(databases),
        directories=tuple(directories),
        logging=_logging(top.get("logging"), remarks),
        **{_FIELDS.get(name, name): value for name, value in values.items()},
    )


#: Settings of a database that stood in its replica before Litestream 0.5, and still may.
_ONCE_OF_REPLICAS: Final[tuple[str, ...]] = (
    "retention",
    "retention-check-interval",
    "snapshot-interval",
    "validation-interval",
)


class _EntryReader:
    """Reads the entries of ``dbs``.

    Args:
        replica_defaults, database_defaults: values of the top level.
        variables: of the environment.
        remarks: takes what is to be said.
    """

    def __init__(
        self,
        replica_defaults: Mapping[str, object],
        database_defaults: Mapping[str, object],
        variables: Mapping[str, str],
        remarks: Remarks,
    ) -> None:
        self._replica_defaults = replica_defaults
        self._database_defaults = database_defaults
        self._variables = variables
        self._remarks = remarks

    def database(self, section: Mapping[str, object]) -> DatabaseSettings:
        """An entry with a ``path``."""
        if not section.get("path"):
            raise ConfigError("path is missing: which database file? (or `dir`, for a directory)")
        for name in DIRECTORY_KEYS:
            if name in section:
                raise ConfigError(f"{name}: it belongs to an entry with `dir`")
        values = self._values(section, DATABASE_KEYS)
        path = str(values.pop("path"))
        database_file(path)
        return make_database(path, self._replica(section), values)

    def directory(self, section: Mapping[str, object]) -> DirectorySettings:
        """An entry with a ``dir``."""
        if section.get("path"):
            raise ConfigError("path and dir are both given: keep one of them")
        if section.get("meta-path") and section.get("meta-dir"):
            raise ConfigError("meta-path and meta-dir are both given: keep `meta-dir`")
        values = self._values(section, {**DATABASE_KEYS, **DIRECTORY_KEYS})
        for name, what in (("dir", "which directory?"), ("pattern", "which files? *.db, perhaps")):
            if name not in values:
                raise ConfigError(f"{name} is missing: {what}")
        of_directory = {name: values.pop(name) for name in DIRECTORY_KEYS if name in values}
        # Of several databases it can only be the place for all of theirs.
        meta_dir = values.pop("meta-path", None) or of_directory.get("meta-dir")
        directory = absolute(str(of_directory["dir"]))
        return DirectorySettings(
            directory=directory,
            pattern=str(of_directory["pattern"]),
            recursive=bool(of_directory.get("recursive")),
            watch=bool(of_directory.get("watch")),
            meta_dir=absolute(str(meta_dir)) if meta_dir else None,
            template=make_database(str(directory), self._replica(section), values),
        )

    @staticmethod
    def _fields(section: Mapping[str, object]) -> dict[str, object]:
        """What an entry says of its replica, by name.

        Raises:
            ConfigError: nothing, or of more than one.
        """
        replica = section.get("replica")
        several = section.get("replicas")
        if replica is not None and several is not None:
            raise ConfigError("replica and replicas are both given: keep `replica`")
        if several is not None:
            if not isinstance(several, list) or len(several) != 1:
                raise ConfigError("replicas: exactly one replica is supported")
            replica = several[0]
        if replica is None:
            raise ConfigError("replica is missing: where to?")
        if isinstance(replica, str):
            replica = {"url": replica}
        return dict(_section(replica, "replica"))

    def _values(
        self, section: Mapping[str, object], parsers: Mapping[str, Parser]
    ) -> dict[str, object]:
        for name, reason in REFUSED.items():
            if name in section:
                raise ConfigError(f"{name}: {reason}")
        values = dict(self._database_defaults)
        fields = self._fields(section)
        given = {name: fields[name] for name in _ONCE_OF_REPLICAS if name in fields}
        given.update(section)
        for key, value in given.items():
            if key in ("replica", "replicas"):
                continue
            if key not in parsers:
                self._remarks.pass_over(key, (*parsers, "replica"), "a database")
            elif value is not None and value != "":
                values[key] = parsers[key](key, value)
        return values

    def _replica(self, section: Mapping[str, object]) -> ReplicaSettings:
        fields = self._fields(section)
        for name in _ONCE_OF_REPLICAS:
            fields.pop(name, None)
        try:
            given = known_values(fields, "a replica", self._remarks)
            return make_replica(given, self._replica_defaults, self._variables)
        except ConfigError as error:
            raise ConfigError(f"replica: {error}") from error


class _Distinct:
    """Databases that are no two with one file, or with one replica."""

    def __init__(self) -> None:
        self._paths: set[Path] = set()
        self._replicas: dict[object, Path] = {}

    def add(self, database: DatabaseSettings) -> None:
        """One more.

        Raises:
            ConfigError: there was one like it.
        """
        if database.path in self._paths:
            raise ConfigError(f"{database.path} is listed twice")
        self._paths.add(database.path)
        if database.replica is None:
            return
        store = database.replica.store
        place: object = (
            store.path
            if isinstance(store, LocalSettings)
            else (store.endpoint, store.bucket, store.path)
        )
        first = self._replicas.setdefault(place, database.path)
        if first != database.path:
            raise ConfigError(
                f"{first} and {database.path} have the same replica: give each its own `path`"
            )


def _logging(section: object, remarks: Remarks) -> LoggingSettings:
    values: dict[str, Any] = {}
    for key, value in _section(section, "logging").items():
        if key not in _LOGGING_KEYS:
            remarks.pass_over(key, _LOGGING_KEYS, "logging")
        elif value is not None and value != "":
            values[key] = _LOGGING_KEYS[key](f"logging.{key}", value)
    return LoggingSettings(**values)


def _section(node: object, what: str) -> dict[str, object]:
    if node is None:
        return {}
    if not isinstance(node, dict):
        raise ConfigError(f"{what}: settings are expected (name: value)")
    values: dict[str, object] = {}
    for key, value in node.items():
        name = str(key).replace("_", "-")
        if name in values:
            raise ConfigError(f"{what}: {name} is given twice")
        values[name] = value
    return values
