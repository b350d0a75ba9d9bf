"""Where settings come from: keywords, mappings, URLs, a YAML file and the environment.

The only module that reads the environment.  Names have hyphens in files and underscores in Python;
both are understood everywhere.  Which of several sources wins, from the first to the last:

1. keywords and the fields of a mapping or a configuration file's entry,
2. the URL,
3. the global keys of a configuration file,
4. ``LITESTREAM_*`` variables, but only where the ``AWS_*`` one is unset,
5. ``AWS_*`` variables,
6. the AWS SDK's own chain (profiles, instance roles).

Files have Litestream's format.  The settings are in ``replica.settings``, URLs and providers in
``replica.url``, readers of single values in ``replica.values``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from walship.replica.errors import ConfigError
from walship.replica.settings import (
    DATABASE_KEYS,
    REFUSED,
    REPLICA_KEYS,
    WITHOUT_EFFECT,
    DatabaseSettings,
    Parser,
    ReplicaSettings,
    database_path,
    known_values,
    make_database,
    make_replica,
    pass_over,
    without_effect,
)
from walship.replica.store.settings import LocalSettings
from walship.replica.values import nearest, parse_bool, parse_choice

__all__ = [
    "DATABASE_KEYS",
    "GLOBAL_KEYS",
    "REPLICA_KEYS",
    "WITHOUT_EFFECT",
    "DatabaseSettings",
    "LoggingSettings",
    "ReplicaSettings",
    "Settings",
    "database_settings",
    "default_replica",
    "load_config",
    "parse_replica",
]

#: Keys of a configuration file's top level besides those of replicas and databases, which are
#: defaults there.
GLOBAL_KEYS: Final = ("dbs", "logging")


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """The ``logging`` section; it concerns the command line only, never an application's logging.

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
        databases: its ``dbs`` entries in order.
        logging: its ``logging`` section.
    """

    databases: tuple[DatabaseSettings, ...] = ()
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def database(self, path: str | os.PathLike[str]) -> DatabaseSettings | None:
        """The entry for a database file, or None."""
        wanted = os.path.realpath(database_path(os.fspath(path)))
        for database in self.databases:
            if os.path.realpath(database.path) == wanted:
                return database
        return None


# --- entry points --------------------------------------------------------------------------------


def parse_replica(
    replica: str | os.PathLike[str] | Mapping[str, object],
    *,
    environ: Mapping[str, str] | None = None,
    **keywords: object,
) -> ReplicaSettings:
    """Read a replica: a URL, the path of a directory, or a mapping of settings.

    Args:
        environ: the process's environment unless given.
        keywords: further settings with underscores; they win.

    Raises:
        ConfigError: an unknown or unusable setting.
    """
    given = known_values(keywords, "setting of a replica", strict=True)
    if isinstance(replica, Mapping):
        given = {**known_values(replica, "setting of a replica", strict=True), **given}
    else:
        given["url"] = os.fspath(replica)
        if not isinstance(given["url"], str):
            raise ConfigError("replica: a URL, a path or a mapping is expected")
        if "path" in given:
            raise ConfigError("replica: the path is part of the URL, or all is a mapping")
    return make_replica(given, {}, _environment(environ))


def database_settings(
    path: str | os.PathLike[str],
    replica: str | os.PathLike[str] | Mapping[str, object] | ReplicaSettings | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    **keywords: object,
) -> DatabaseSettings:
    """Read the settings of one database; keywords are those of the database and of the replica.

    Args:
        path: the database file; ``~`` and a ``sqlite:///`` prefix are understood.
        replica: see ``parse_replica``; without one the keywords may hold it (``bucket=...``).
        environ: the process's environment unless given.

    Raises:
        ConfigError: an unknown or unusable setting.
    """
    known = {**dict.fromkeys(REPLICA_KEYS), **dict.fromkeys(DATABASE_KEYS)}
    of_database: dict[str, object] = {}
    of_replica: dict[str, object] = {}
    for keyword, value in keywords.items():
        name = keyword.replace("_", "-")
        if name in DATABASE_KEYS and name != "path":
            of_database[name] = value
        elif name in REPLICA_KEYS and name != "path":
            of_replica[name] = value
        elif name in REFUSED:
            raise ConfigError(f"{keyword}: {REFUSED[name]}")
        elif name in WITHOUT_EFFECT:
            without_effect(name)
        else:
            raise ConfigError(f"unknown setting {keyword!r}{nearest(name, known)}")
    if isinstance(replica, ReplicaSettings):
        if of_replica:
            name = next(iter(of_replica))
            raise ConfigError(f"{name}: the replica's settings are complete already")
        parsed: ReplicaSettings | None = replica
    elif replica is not None or of_replica:
        parsed = parse_replica(
            {} if replica is None else replica, environ=environ, **_as_keywords(of_replica)
        )
    else:
        parsed = None
    values = {name: DATABASE_KEYS[name](name, value) for name, value in of_database.items()}
    return make_database(os.fspath(path), parsed, values)


def default_replica(environ: Mapping[str, str] | None = None) -> ReplicaSettings | None:
    """What ``WALSHIP_REPLICA`` names (variables in it are expanded), or None if it is not set.

    Raises:
        ConfigError: it cannot be used, or a variable in it is not set.
    """
    variables = _environment(environ)
    text = variables.get("WALSHIP_REPLICA", "").strip()
    if not text:
        return None
    expanded = _expanded(text, variables)
    if missing := _undefined(expanded):
        raise ConfigError(f"WALSHIP_REPLICA: the variable {missing} in it is not set")
    return parse_replica(expanded, environ=variables)


def load_config(
    path: str | os.PathLike[str],
    *,
    environ: Mapping[str, str] | None = None,
    expand_env: bool = True,
) -> Settings:
    """Read a configuration file in Litestream's format.

    Unknown keys are logged as warnings; what cannot be used is an error.

    Args:
        environ: the process's environment unless given.
        expand_env: replace ``$NAME`` and ``${NAME}`` in values; what is not set becomes empty,
            except where that would name the wrong database or bucket.

    Raises:
        ConfigError: no such file, not YAML, or a setting that cannot be used.
    """
    file = Path(path).expanduser()
    variables = _environment(environ)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration file {file}: {reason}") from error
    try:
        return _settings(_load_yaml(text, variables, expand_env), variables)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


# --- files ---------------------------------------------------------------------------------------


class _TextLoader(yaml.SafeLoader):
    """YAML where every scalar but null is text, so that ``no``, ``010`` and ``1:30`` stay as
    written; the readers of ``replica.values`` know what a setting is."""


_TextLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

_VARIABLE: Final = re.compile(r"\$(?:\{([^{}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Marks where an undefined variable stood; private-use characters, so that nothing else looks so.
_UNDEFINED: Final = re.compile("\ue000([^\ue001]*)\ue001")
#: An undefined variable in one of these is an error.
_MUST_BE_DEFINED: Final = frozenset({"url", "bucket", "path", "endpoint", "meta-path", "replica"})


def _load_yaml(text: str, variables: Mapping[str, str], expand_env: bool) -> object:
    """Parse, then expand each value: a secret with ``#`` or ``:`` in it stays whole."""
    try:
        loaded = yaml.load(text, _TextLoader)
    except yaml.YAMLError as error:
        if expand_env and "$" in text:
            # A variable may hold a piece of the structure, as in `dbs: [${DBS}]`.
            whole = _UNDEFINED.sub("", _expanded(text, variables))
            try:
                return yaml.load(whole, _TextLoader)
            except yaml.YAMLError:
                pass
        raise ConfigError(f"not YAML: {_yaml_problem(error)}") from error
    except RecursionError as error:
        raise ConfigError("not usable YAML: it is nested too deeply") from error
    return _expand_values(loaded, variables, "") if expand_env else loaded


def _yaml_problem(error: yaml.YAMLError) -> str:
    # Not the offending line itself: there may be a secret on it.
    problem = getattr(error, "problem", None) or "it cannot be parsed"
    mark = getattr(error, "problem_mark", None)
    return f"{problem} (line {mark.line + 1})" if mark is not None else str(problem)


def _expand_values(node: object, variables: Mapping[str, str], key: str) -> object:
    if isinstance(node, str):
        text = _expanded(node, variables)
        if (missing := _undefined(text)) and key in _MUST_BE_DEFINED:
            raise ConfigError(f"{key}: the variable {missing} is not set")
        return _UNDEFINED.sub("", text)
    if isinstance(node, dict):
        return {
            name: _expand_values(value, variables, str(name).replace("_", "-"))
            for name, value in node.items()
        }
    if isinstance(node, list):
        return [_expand_values(value, variables, key) for value in node]
    return node


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match[1] if match[1] is not None else match[2]
        if _NAME.fullmatch(name) is None:
            raise ConfigError(f"${{{name}}}: only ${{NAME}} is expanded")
        if name == "PID" and name not in variables:
            return str(os.getpid())
        value = variables.get(name)
        return f"\ue000{name}\ue001" if value is None else value

    return _VARIABLE.sub(replace, text)


def _undefined(text: str) -> str | None:
    match = _UNDEFINED.search(text)
    return match[1] if match is not None else None


def _settings(loaded: object, variables: Mapping[str, str]) -> Settings:
    top = _section(loaded, "the file")
    replica_defaults: dict[str, object] = {}
    database_defaults: dict[str, object] = {}
    for key, value in top.items():
        if key in ("url", "meta-path"):
            raise ConfigError(f"{key}: it belongs to a database, below dbs")
        if key in REPLICA_KEYS:
            if value is not None and value != "":
                replica_defaults[key] = REPLICA_KEYS[key](key, value)
        elif key in DATABASE_KEYS:
            if value is not None and value != "":
                database_defaults[key] = DATABASE_KEYS[key](key, value)
        elif key not in GLOBAL_KEYS:
            pass_over(key, (*GLOBAL_KEYS, *REPLICA_KEYS, *DATABASE_KEYS), "the top level")
    entries = top.get("dbs") or []
    if not isinstance(entries, list):
        raise ConfigError("dbs: a list is expected (each entry begins with '-')")
    databases = []
    for number, entry in enumerate(entries, 1):
        try:
            databases.append(_database_entry(entry, replica_defaults, database_defaults, variables))
        except ConfigError as error:
            raise ConfigError(f"dbs[{number}]: {error}") from error
    _check_distinct(databases)
    return Settings(databases=tuple(databases), logging=_logging(top.get("logging")))


def _database_entry(
    entry: object,
    replica_defaults: Mapping[str, object],
    database_defaults: Mapping[str, object],
    variables: Mapping[str, str],
) -> DatabaseSettings:
    section = _section(entry, "an entry of dbs")
    for name, reason in REFUSED.items():
        if name in section:
            raise ConfigError(f"{name}: {reason}")
    if not section.get("path"):
        raise ConfigError("path is missing: which database file?")
    values = dict(database_defaults)
    for key, value in section.items():
        if key in ("replica", "replicas"):
            continue
        if key not in DATABASE_KEYS:
            pass_over(key, (*DATABASE_KEYS, "replica"), "a database")
        elif value is not None and value != "":
            values[key] = DATABASE_KEYS[key](key, value)
    path = str(values.pop("path"))
    return make_database(path, _entry_replica(section, replica_defaults, variables), values)


def _entry_replica(
    section: Mapping[str, object],
    defaults: Mapping[str, object],
    variables: Mapping[str, str],
) -> ReplicaSettings:
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
    fields = _section(replica, "replica")
    given = known_values(fields, "a replica", strict=False)
    try:
        return make_replica(given, defaults, variables)
    except ConfigError as error:
        raise ConfigError(f"replica: {error}") from error


def _check_distinct(databases: Iterable[DatabaseSettings]) -> None:
    paths: set[Path] = set()
    replicas: dict[object, Path] = {}
    for database in databases:
        if database.path in paths:
            raise ConfigError(f"{database.path} is listed twice")
        paths.add(database.path)
        if database.replica is None:
            continue
        store = database.replica.store
        place: object = (
            store.path
            if isinstance(store, LocalSettings)
            else (store.endpoint, store.bucket, store.path)
        )
        if place in replicas:
            raise ConfigError(
                f"{replicas[place]} and {database.path} have the same replica: give each its "
                "own `path`"
            )
        replicas[place] = database.path


def _logging(section: object) -> LoggingSettings:
    parsers: Mapping[str, Parser] = {
        "level": parse_choice("trace", "debug", "info", "warn", "warning", "error"),
        "type": parse_choice("text", "json", "pretty"),
        "stderr": parse_bool,
        "source": parse_bool,
    }
    values: dict[str, Any] = {}
    for key, value in _section(section, "logging").items() if section else ():
        if key not in parsers:
            pass_over(key, parsers, "logging")
        elif value is not None and value != "":
            values[key] = parsers[key](f"logging.{key}", value)
    return LoggingSettings(**values)


def _section(node: object, what: str) -> dict[str, object]:
    if node is None:
        return {}
    if not isinstance(node, dict):
        raise ConfigError(f"{what}: settings are expected (name: value)")
    return {str(key).replace("_", "-"): value for key, value in node.items()}


# --- small things --------------------------------------------------------------------------------


def _environment(environ: Mapping[str, str] | None) -> Mapping[str, str]:
    return os.environ if environ is None else environ


def _as_keywords(values: Mapping[str, object]) -> dict[str, object]:
    return {name.replace("-", "_"): value for name, value in values.items()}
