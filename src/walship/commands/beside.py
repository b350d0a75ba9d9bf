"""``walship replicate`` and the commands to it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Final

from walship.commands.exits import EXIT_OK
from walship.commands.output import print_json
from walship.commands.targets import load, required_config
from walship.replica.clock import Clock
from walship.replica.config.file import SocketSettings
from walship.replica.config.settings import database_file, database_path
from walship.replica.config.sources import (
    Settings,
    database_settings,
    log_level,
    parse_replica,
)
from walship.replica.errors import (
    ConfigError,
)
from walship.replica.format.types import format_txid
from walship.sidecar.commands import control, replicate, socket_of
from walship.vfs.registry import canonical

__all__ = ["run_control", "run_replicate"]


def run_replicate(arguments: argparse.Namespace, clock: Clock) -> int:
    if arguments.database is not None and arguments.replica is None:
        raise ConfigError(
            f"where to? Try: walship replicate {arguments.database} s3://bucket/path (or name the"
            " database in a configuration file, and give no argument)"
        )
    if arguments.database is not None and arguments.config is not None:
        raise ConfigError("DB REPLICA and -config exclude each other: drop one of them")

    def read() -> Settings:
        if arguments.database is None:
            settings, _ = required_config(arguments)
        else:
            path = database_file(arguments.database)
            replica = parse_replica(arguments.replica)
            settings = Settings(databases=(database_settings(path, replica),))
        if arguments.socket is not None:
            permissions = settings.socket or SocketSettings()
            settings = replace(settings, socket=replace(permissions, path=arguments.socket))
        level = arguments.log_level or log_level() or settings.logging.level
        return replace(settings, logging=replace(settings.logging, level=level))

    return replicate(
        read,
        command=arguments.exec,
        only_once=arguments.once,
        snapshot=arguments.force_snapshot,
        tend=arguments.enforce_retention,
        restore_missing=arguments.restore_if_db_not_exists,
    )


def run_control(arguments: argparse.Namespace, clock: Clock) -> int:
    loaded = None if arguments.socket is not None else load(arguments)
    socket = socket_of(arguments.socket, None if loaded is None else loaded[0])
    path = str(database_path(arguments.database))
    if arguments.command == "unregister" and arguments.dry_run:
        return _would_unregister(arguments, socket, path)
    fields: dict[str, object] = {"path": path}
    if arguments.command == "register":
        fields["replica_url"] = arguments.replica
    if arguments.command == "sync":
        fields["wait"] = arguments.wait
    answer = control(socket, arguments.command, arguments.timeout, **fields)
    if arguments.json:
        print_json(answer)
        return EXIT_OK
    txids = [f"{name} {format_txid(answer[name])}" for name in _TXIDS if name in answer]
    print(", ".join([f"{answer['path']}: {answer['status']}", *txids]))
    return EXIT_OK


def _would_unregister(arguments: argparse.Namespace, socket: str, path: str) -> int:
    """Unregister -dry-run: the answer that a request would get, without one."""
    listed = control(socket, "list", arguments.timeout)["databases"]
    row = next((row for row in listed if row["path"] == canonical(path)), None)
    status = "already_unregistered" if row is None else "would_be_unregistered"
    answer = {"status": status, "path": path, "txid": (row or {}).get("txid", 0)}
    if arguments.json:
        print_json(answer)
    else:
        after = "" if row is None else f", after txid {format_txid(answer['txid'])} is shipped"
        print(f"{path}: {status}{after}; nothing was changed")
    return EXIT_OK


_TXIDS: Final = ("txid", "replicated_txid")
