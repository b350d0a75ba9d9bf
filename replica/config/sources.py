"""Where settings come from: keywords, mappings, URLs, a YAML file and the environment.

The only module that reads the environment.  Names have hyphens in files and underscores in Python;
both are understood everywhere.  Which of several sources wins, from the first to the last:

1. keywords and the fields of a mapping or a configuration file's entry,
2. the URL,
3. the global keys of a configuration file,
4. ``AWS_*`` variables; where one is unset, its ``LITESTREAM_*`` counterpart,
5. the AWS SDK's own chain (profiles, instance roles).

Files have Litestream's format: ``text`` reads the text, ``file`` what is in it.  The settings
are in ``settings``, URLs and providers in ``url``, readers of single values in ``values``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from walship.replica.errors import ConfigError

from .directories import DIRECTORY_KEYS, DirectorySettings
from .file import (
    GLOBAL_KEYS,
    LOG_LEVELS,
    LoggingSettings,
    Settings,
    read_settings,
)
from .settings import (
    DATABASE_KEYS,
    REFUSED,
    REPLICA_KEYS,
    WITHOUT_EFFECT,
    DatabaseSettings,
    Remarks,
    ReplicaSettings,
    known_values,
    make_database,
    make_replica,
)
from .text import expand_text, load_text
from .values import nearest

__all__ = [
    "CONFIG_PLACES",
    "DATABASE_KEYS",
    "DIRECTORY_KEYS",
    "GLOBAL_KEYS",
    "REPLICA_KEYS",
    "WITHOUT_EFFECT",
    "DatabaseSettings",
    "DirectorySettings",
    "LoggingSettings",
    "ReplicaSettings",
    "Settings",
    "database_settings",
    "default_replica",
    "find_config",
    "load_config",
    "log_level",
    "parse_replica",
]

#: Where a configuration file is looked for, in this order, if no variable names one.
CONFIG_PLACES: Final = ("walship.yml", "/etc/walship.yml", "/etc/litestream.yml")


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
    remarks = Remarks(strict=True)
    given = known_values(keywords, "a replica", remarks)
    if isinstance(replica, Mapping):
        given = {**known_values(replica, "a replica", remarks), **given}
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
    remarks = Remarks(strict=True)
    for keyword, value in keywords.items():
        name = keyword.replace("_", "-")
        if name in DATABASE_KEYS and name != "path":
            of_database[name] = value
        elif name in REPLICA_KEYS and name != "path":
            of_replica[name] = value
        elif name in REFUSED:
            raise ConfigError(f"{keyword}: {REFUSED[name]}")
        elif name in WITHOUT_EFFECT:
            remarks.without_effect(name)
        elif name in DIRECTORY_KEYS:
            raise ConfigError(f"{keyword}: it belongs into a configuration file")
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
    return parse_replica(expand_text("WALSHIP_REPLICA", text, variables), environ=variables)


def find_config(environ: Mapping[str, str] | None = None) -> Path | None:
    """The configuration file to use where none is named, or None.

    That is what ``WALSHIP_CONFIG`` names, else what ``LITESTREAM_CONFIG`` names, whether it exists
    or not; else the first of `CONFIG_PLACES` that exists.
    """
    variables = _environment(environ)
    for name in ("WALSHIP_CONFIG", "LITESTREAM_CONFIG"):
        if variables.get(name):
            return Path(variables[name]).expanduser()
    return next((Path(place) for place in CONFIG_PLACES if os.path.exists(place)), None)


def load_config(
    path: str | os.PathLike[str],
    *,
    environ: Mapping[str, str] | None = None,
    expand_env: bool = True,
    strict: bool = False,
) -> Settings:
    """Read a configuration file in Litestream's format.

    Unknown keys are logged as warnings; what cannot be used is an error.

    Args:
        environ: the process's environment unless given.
        expand_env: replace ``$NAME`` and ``${NAME}`` in values; what is not set becomes empty,
            with a warning, except where that would name the wrong database or bucket.
        strict: an unknown key is an error.

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
        return read_settings(
            load_text(text, variables, expand=expand_env), variables, strict=strict
        )
    except ConfigError as error:
        from .yaml_text import line_of  # loaded by now

        line = line_of(text, str(error))
        where = "" if line is None else f" (line {line})"
        raise ConfigError(f"{file}: {error}{where}") from error


def log_level(environ: Mapping[str, str] | None = None) -> str | None:
    """The level that ``LOG_LEVEL`` names, in lower case; None if it is not set, or names none.

    Other programs read that variable too, with levels of their own: those are passed over.
    """
    level = _environment(environ).get("LOG_LEVEL", "").strip().lower()
    return level if level in LOG_LEVELS else None


# --- small things --------------------------------------------------------------------------------


def _environment(environ: Mapping[str, str] | None) -> Mapping[str, str]:
    return os.environ if environ is None else environ


def _as_keywords(values: Mapping[str, object]) -> dict[str, object]:
    return {name.replace("-", "_"): value for name, value in values.items()}
