"""What the arguments mean: a database of the configuration file, or a replica."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from walship.replica.clock import Clock
from walship.replica.config.settings import DatabaseSettings, ReplicaSettings, database_path
from walship.replica.config.sources import (
    CONFIG_PLACES,
    Settings,
    default_replica,
    find_config,
    load_config,
    parse_replica,
)
from walship.replica.config.url import is_url
from walship.replica.errors import (
    ConfigError,
)
from walship.replica.spool import state_directory
from walship.replica.store.base import ObjectStore
from walship.replica.store.opening import open_store
from walship.replica.store.retrying import RetryingStore
from walship.replica.store.settings import LocalSettings

__all__ = [
    "in_file",
    "its_replica",
    "kind_of",
    "load",
    "opened",
    "replica_of",
    "required_config",
    "state_directory_of",
]


def load(arguments: argparse.Namespace) -> tuple[Settings, Path] | None:
    """The configuration file that is meant, read; None if there is none."""
    file = find_config() if arguments.config is None else Path(arguments.config)
    if file is None:
        return None
    expand_env = not arguments.no_expand_env
    return load_config(file, expand_env=expand_env, strict=arguments.strict), file


def replica_of(arguments: argparse.Namespace) -> tuple[ReplicaSettings, Path | None]:
    """The replica that DB|REPLICA means, and the database if it is one."""
    target: str = arguments.target
    if is_url(target) and not target.startswith(("sqlite:", "sqlite3:")):
        if arguments.config is not None:
            raise ConfigError("a replica URL and -config exclude each other: drop one of them")
        return parse_replica(target), None
    if arguments.config is None and os.path.isdir(target):
        return parse_replica(target), None
    database = in_file(arguments, target)
    if database is not None:
        return its_replica(database), database.path
    replica = default_replica()
    if replica is None:
        raise ConfigError(
            f"where is the replica of {database_path(target)}? Give -config FILE, a replica URL in"
            " place of the database, or set WALSHIP_REPLICA"
        )
    return replica, database_path(target)


def in_file(arguments: argparse.Namespace, path: str) -> DatabaseSettings | None:
    """The settings of a database in the configuration file.

    None without a file, and also if it does not have them, but the environment has a replica and
    the file was not named here.
    """
    loaded = load(arguments)
    if loaded is None:
        return None
    settings, file = loaded
    database = settings.database(path)
    if database is None and (arguments.config is not None or default_replica() is None):
        databases = [str(each.path) for each in settings.databases]
        patterns = [str(each.directory / each.pattern) for each in settings.directories]
        known = ", ".join(databases + patterns) or "none"
        raise ConfigError(f"{database_path(path)} is not in {file}; it has: {known}")
    return database


def its_replica(database: DatabaseSettings) -> ReplicaSettings:
    if database.replica is None:
        raise ConfigError(f"{database.path} has no replica in the configuration file")
    return database.replica


@contextlib.contextmanager
def opened(replica: ReplicaSettings, clock: Clock) -> Iterator[ObjectStore]:
    with closing(RetryingStore(open_store(replica.store, clock), clock)) as store:
        yield store


def kind_of(replica: ReplicaSettings) -> str:
    return "file" if isinstance(replica.store, LocalSettings) else "s3"


def state_directory_of(arguments: argparse.Namespace, path: Path) -> Path:
    loaded = load(arguments)
    database = loaded[0].database(str(path)) if loaded is not None else None
    return state_directory(path) if database is None else database.meta_path


def required_config(arguments: argparse.Namespace) -> tuple[Settings, Path]:
    loaded = load(arguments)
    if loaded is None:
        raise ConfigError(
            f"which databases? Try: walship {arguments.command} -config walship.yml (looked for:"
            f" {', '.join(CONFIG_PLACES)})"
        )
    return loaded
