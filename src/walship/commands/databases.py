"""Commands that look at databases on this machine, and at the processes that have them open."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from walship import __version__
from walship.commands.exits import EXIT_OK, VERIFY_CODES, exit_code
from walship.commands.output import human_size, one_line, print_json, print_table, say, timestamp
from walship.commands.targets import kind_of, load, required_config
from walship.replica.clock import Clock
from walship.replica.config.settings import ReplicaSettings, database_file
from walship.replica.config.sources import (
    default_replica,
)
from walship.replica.errors import (
    ConfigError,
    ReplicaError,
)
from walship.replica.format.types import format_txid
from walship.replica.overview import Overview, ask_running, look_at
from walship.replica.process import started_ms
from walship.replica.reset import reset
from walship.replica.spool import state_directory
from walship.replica.verify import last_verified
from walship.sidecar.commands import control

__all__ = ["run_databases", "run_info", "run_list", "run_reset", "run_status"]


#: How long `status` waits for a process that has the database open, seconds.
_ASK_S: Final = 1.0


#: States of a running database in the words that Litestream's `list` has for them.
_LIST_STATES: Final[Mapping[str, str]] = {
    "opening": "open",
    "ok": "replicating",
    "retrying": "replicating",
}


def run_databases(arguments: argparse.Namespace, clock: Clock) -> int:
    # This is the command that looks at the file: it also says what is not needed in there.
    logging.getLogger("walship").setLevel(logging.INFO)
    settings, _ = required_config(arguments)
    for directory in settings.directories:
        if not directory.directory.is_dir():
            say(f"warning: there is no directory {directory.directory}")
    rows = [
        [str(each.path), "-" if each.replica is None else kind_of(each.replica)]
        for each in settings.all_databases()
    ]
    if arguments.json:
        print_json([{"path": path, "replica": replica} for path, replica in rows])
    else:
        print_table(["path", "replica"], rows)
    return EXIT_OK


def run_list(arguments: argparse.Namespace, clock: Clock) -> int:
    if arguments.socket is not None:
        answer = control(arguments.socket, "list", arguments.timeout)
        return _print_list(arguments, answer["databases"])
    settings, _ = required_config(arguments)
    rows = []
    for database in settings.all_databases():
        running = ask_running(database.meta_path, arguments.timeout)
        row = {"path": str(database.path), "status": "stopped"}
        if running is not None:
            row["status"] = _LIST_STATES.get(running.state, "stopped")
            if running.last_upload_ms is not None:
                row["last_sync_at"] = timestamp(running.last_upload_ms)
        rows.append(row)
    return _print_list(arguments, rows)


def _print_list(arguments: argparse.Namespace, rows: Sequence[Mapping[str, object]]) -> int:
    if arguments.json:
        print_json({"databases": rows})
        return EXIT_OK
    for row in rows:
        synced = f" (last sync: {row['last_sync_at']})" if "last_sync_at" in row else ""
        print(f"{row['path']} [{row['status']}]{synced}")
    return EXIT_OK


def run_info(arguments: argparse.Namespace, clock: Clock) -> int:
    if arguments.socket is not None:
        answer = control(arguments.socket, "info", arguments.timeout)
        if arguments.json:
            print_json(answer)
            return EXIT_OK
        for name, value in answer.items():
            print(f"{name}: {value}")
        return EXIT_OK
    settings, file = required_config(arguments)
    by_process: dict[int, list[str]] = {}
    for database in settings.all_databases():
        running = ask_running(database.meta_path, arguments.timeout)
        if running is not None:
            by_process.setdefault(running.pid, []).append(str(database.path))
    if not by_process:
        raise ConfigError(
            f"no process has a database of {file} open (`walship databases` lists them)"
        )
    processes = []
    for pid, paths in sorted(by_process.items(), key=lambda item: -len(item[1])):
        process: dict[str, object] = {"pid": pid, "databases": paths}
        started = started_ms(pid)
        if started is not None:
            process["uptime_seconds"] = max(0, clock.now_ms() - started) // 1000
            process["started_at"] = timestamp(started)
        processes.append(process)
    if arguments.json:
        main = {name: value for name, value in processes[0].items() if name != "databases"}
        count = sum(map(len, by_process.values()))
        print_json(
            {
                "version": __version__,
                **main,
                "database_count": count,
                "config": str(file),
                "processes": processes,
            }
        )
        return EXIT_OK
    print(f"version: {__version__}")
    print(f"config: {file}")
    for process in processes:
        since = f", since {process['started_at']}" if "started_at" in process else ""
        print(f"process {process['pid']}{since}:")
        for path in by_process[int(str(process["pid"]))]:
            print(f"  {path}")
    return EXIT_OK


def _chosen(arguments: argparse.Namespace) -> list[tuple[Path, Path, ReplicaSettings | None]]:
    """Databases that are meant: path, state directory, and replica where one is known."""
    if arguments.database is not None:
        loaded = load(arguments)
        wanted = None if loaded is None else loaded[0].database(arguments.database)
        if wanted is not None:
            return [(wanted.path, wanted.meta_path, wanted.replica)]
        if arguments.config is not None:
            raise ConfigError(f"{arguments.database} is not in {arguments.config}")
        path = database_file(arguments.database)
        return [(path, state_directory(path), default_replica())]
    loaded = load(arguments)
    if loaded is None:
        raise ConfigError(
            f"which database? Try: walship {arguments.command} app.db, or -config walship.yml"
        )
    return [(each.path, each.meta_path, each.replica) for each in loaded[0].all_databases()]


def run_reset(arguments: argparse.Namespace, clock: Clock) -> int:
    for path, directory, _ in _chosen(arguments):
        if not path.exists():
            raise ConfigError(f"there is no database {path}")
        txid = reset(directory, clock, dry_run=arguments.dry_run)
        done = "would be reset" if arguments.dry_run else "was reset"
        before = f" (its record ends at TXID {format_txid(txid)})" if txid else ""
        say(f"{path} {done}{before}: the next open ships a full copy as its replica's next state")
    return EXIT_OK


def run_status(arguments: argparse.Namespace, clock: Clock) -> int:
    """How databases stand: by the process that uploads, else by what it left behind."""
    code = EXIT_OK
    rows = []
    for path, directory, replica in _chosen(arguments):
        found = look_at(path, directory, replica, clock, _ASK_S)
        row, error = _status_row(path, found), found.problem
        verified = last_verified(directory)
        row["last_verified"] = "-"
        if verified is not None:
            sound_ms = verified.sound_ms
            row["last_verified"] = "never" if sound_ms is None else timestamp(sound_ms)
            code = code or VERIFY_CODES.get(verified.outcome, EXIT_OK)
            if verified.outcome != "sound":
                row["last_verified"] += f" ({verified.outcome} {timestamp(verified.time_ms)})"
                say(f"{path}: verification: {one_line(ReplicaError(verified.problem))}")
        rows.append(row)
        if error is not None:
            say(one_line(error))
            code = code or exit_code(error)
    if arguments.json:
        print_json(rows)
    else:
        columns = [
            "database",
            "status",
            "state",
            "local_txid",
            "replica_txid",
            "lag",
            "wal_size",
            "last_verified",
        ]
        headings = [name.replace("_", " ") for name in columns]
        print_table(headings, [[row[name] for name in columns] for row in rows])
    return code


def _status_row(path: Path, found: Overview) -> dict[str, str]:
    """Litestream's fields and some more; "-" for what is not known."""
    return {
        "database": str(path),
        "status": found.word,
        "state": found.state or "-",
        "local_txid": format_txid(found.txid) if found.txid else "-",
        "replica_txid": format_txid(found.replicated_txid) if found.replicated_txid else "-",
        "lag": "-" if found.lag_s is None else f"{found.lag_s:.1f} s",
        "wal_size": "-" if found.wal_bytes is None else human_size(found.wal_bytes),
    }
