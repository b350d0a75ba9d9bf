"""``walship restore``: a database from its replica, once or for good."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from walship.commands.exits import ENDED, EXIT_OK
from walship.commands.options import parse_txid_option
from walship.commands.output import (
    human_size,
    one_line,
    print_json,
    print_table,
    say,
    segment_json,
    timestamp,
)
from walship.commands.targets import kind_of, opened, replica_of, state_directory_of
from walship.replica.clock import Clock
from walship.replica.config.settings import ReplicaSettings
from walship.replica.config.values import parse_duration
from walship.replica.errors import (
    ConfigError,
    NoBackupError,
)
from walship.replica.follow import Step, follow, update
from walship.replica.format.types import format_txid
from walship.replica.reset import closed_everywhere
from walship.replica.restore import (
    RestoreResult,
    Source,
    find_source,
    output_file,
    restore,
)
from walship.replica.restore_front import labelled, parse_time, progress_bar, refuse_replicated
from walship.replica.spool import state_directory
from walship.replica.store.base import ObjectStore

__all__ = ["run_restore"]


def run_restore(arguments: argparse.Namespace, clock: Clock) -> int:
    txid = None if arguments.txid is None else parse_txid_option(arguments.txid)
    timestamp_ms = None
    if arguments.timestamp is not None:
        timestamp_ms = parse_time(arguments.timestamp, clock.now_ms())
    replica, database = replica_of(arguments)
    if arguments.o is not None:
        output_file(arguments.o)
        output = Path(arguments.o)
        directory = state_directory(Path(os.path.abspath(output)))
    elif database is not None:
        output, directory = database, state_directory_of(arguments, database)
    else:
        raise ConfigError(f"where to? Try: walship restore -o app.db '{arguments.target}'")
    kept_up = arguments.f or arguments.delta
    if kept_up:
        _check_kept_up(arguments, output)
    if arguments.if_db_not_exists and output.exists() and output.stat().st_size > 0:
        say(f"{output} exists already, nothing to do")
        return EXIT_OK
    with opened(replica, clock) as store:
        try:
            with labelled(store, arguments.label, txid, timestamp_ms) as target_txid:
                if arguments.dry_run:
                    source = find_source(
                        store,
                        txid=target_txid,
                        timestamp_ms=timestamp_ms,
                        parallelism=arguments.parallelism,
                    )
                    _print_source(source, store, replica, output, arguments.json)
                    return EXIT_OK
                if kept_up:
                    return _keep_up(arguments, store, output, clock, target_txid, timestamp_ms)
                with closed_everywhere(directory, clock), progress_bar(output.name) as progress:
                    result = restore(
                        store,
                        output,
                        clock=clock,
                        txid=target_txid,
                        timestamp_ms=timestamp_ms,
                        parallelism=arguments.parallelism,
                        integrity_check=arguments.integrity_check,
                        verify=arguments.verify,
                        progress=progress,
                        overwrite=arguments.force,
                    )
        except NoBackupError as error:
            if not arguments.if_replica_exists:
                raise
            say(f"{one_line(error)}; nothing to do")
            return EXIT_OK
    _report(result, output, replica, arguments.json)
    return EXIT_OK


def _check_kept_up(arguments: argparse.Namespace, output: Path) -> None:
    if arguments.f and arguments.delta:
        raise ConfigError("-f goes on where -delta ends: give one of them")
    if arguments.f and (arguments.txid or arguments.timestamp or arguments.label):
        raise ConfigError("-f follows to the newest state: leave out -txid, -timestamp and -label")
    if arguments.dry_run:
        raise ConfigError("-dry-run shows what a full restore reads: leave out -f and -delta")
    if arguments.if_db_not_exists:
        raise ConfigError("-f and -delta go on with an output that exists: drop -if-db-not-exists")
    refuse_replicated(output)


def _keep_up(
    arguments: argparse.Namespace,
    store: ObjectStore,
    output: Path,
    clock: Clock,
    txid: int | None,
    timestamp_ms: int | None,
) -> int:
    """restore -delta, restore -f: bring a copy up to date, once or until a signal comes."""

    def report(step: Step) -> None:
        if arguments.json:
            facts = {
                "db_path": str(output),
                "txid": format_txid(step.txid),
                "segments": step.n_segments,
                "bytes_fetched": step.size_bytes,
                "pages_written": step.n_pages,
            }
            print(json.dumps(facts), flush=True)

    options: dict[str, Any] = {
        "clock": clock,
        "parallelism": arguments.parallelism,
        "integrity_check": arguments.integrity_check,
        "verify": arguments.verify,
        "overwrite": arguments.force,
    }
    if arguments.delta:
        with progress_bar(output.name) as progress:
            step = update(
                store, output, txid=txid, timestamp_ms=timestamp_ms, progress=progress, **options
            )
        report(step)
        if not arguments.json:
            say(
                f"{output} holds TXID {format_txid(step.txid)}: fetched"
                f" {human_size(step.size_bytes)} in {step.n_segments} segment(s), wrote"
                f" {step.n_pages} page(s)"
            )
        return EXIT_OK
    interval_s = parse_duration("-follow-interval", arguments.follow_interval)
    reached = 0

    def note(step: Step) -> None:
        nonlocal reached
        if not reached:
            say(
                f"{output} holds TXID {format_txid(step.txid)}; following {store.url}, one LIST"
                f" request every {interval_s:g} s"
            )
        reached = step.txid
        report(step)

    def wait(seconds: float) -> bool:
        clock.sleep(seconds)
        return False

    try:
        follow(store, output, wait=wait, interval_s=interval_s, on_step=note, **options)
    except KeyboardInterrupt:
        if not reached:
            raise
        say(f"ended; {output} holds TXID {format_txid(reached)} at least")
    return ENDED


def _report(result: RestoreResult, output: Path, replica: ReplicaSettings, as_json: bool) -> None:
    txid = None if result.txid is None else format_txid(result.txid)
    if as_json:
        print_json(
            {
                "db_path": str(output),
                "replica": kind_of(replica),
                "txid": txid,
                "duration_ms": round(result.duration_s * 1000),
                "integrity_check": result.integrity_check,
                "page_size": result.page_size,
                "commit": result.commit,
                "segments": result.n_segments,
                "bytes_fetched": result.bytes_fetched,
                "pages_decoded": result.pages_decoded,
                "warnings": list(result.warnings),
            }
        )
        return
    size = human_size(result.page_size * result.commit)
    state = "a replica of Litestream 0.3" if txid is None else f"TXID {txid}"
    say(
        f"restored {output} from {state}: {size} in {result.duration_s:.1f} s, fetched"
        f" {human_size(result.bytes_fetched)} in {result.n_segments} segment(s)"
    )


def _print_source(
    source: Source, store: ObjectStore, replica: ReplicaSettings, output: Path, as_json: bool
) -> None:
    if source.plan is not None:
        files = [segment_json(each, named=True) for each in source.plan.segments]
        min_txid: str | None = format_txid(source.plan.min_txid)
        max_txid: str | None = format_txid(source.plan.max_txid)
        warnings = source.plan.warnings
    else:
        assert source.v03 is not None
        files = [
            {
                "level": None,
                "name": each.info.key,
                "min_txid": None,
                "max_txid": None,
                "size": each.info.size_bytes,
                "timestamp": timestamp(each.info.modified_ms),
            }
            for each in (source.v03.snapshot, *source.v03.wal)
        ]
        min_txid = max_txid = None
        warnings = ()
    for warning in warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json(
            {
                "source": store.url,
                "target_path": str(output),
                "replica": kind_of(replica),
                "min_txid": min_txid,
                "max_txid": max_txid,
                "files": files,
            }
        )
        return
    print("Restore plan:")
    print(f"  source: {store.url}")
    print(f"  target: {output}")
    print(f"  replica: {kind_of(replica)}")
    if min_txid is not None:
        print(f"  txid range: {min_txid} - {max_txid}")
    print("\nFiles to fetch:")
    columns = ["level", "name", "min_txid", "max_txid", "size", "timestamp"]
    headings = ["level", "file", *columns[2:]]
    print_table(headings, [["-" if f[c] is None else str(f[c]) for c in columns] for f in files])
