"""Commands that look at a replica: what it holds, whether it is sound, whether its store is fit."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from walship.commands.exits import EXIT_OK, EXIT_UNFIT, VERIFY_CODES
from walship.commands.output import (
    human_duration,
    print_json,
    print_table,
    say,
    segment_json,
    timestamp,
)
from walship.commands.targets import opened, replica_of, state_directory_of
from walship.replica.clock import Clock
from walship.replica.doctor.probe import probe
from walship.replica.doctor.report import Printer, as_json, notes_about
from walship.replica.errors import (
    ConfigError,
)
from walship.replica.format.types import LEVEL_MAX, format_txid
from walship.replica.marks import remove_mark
from walship.replica.plan import format_time
from walship.replica.restore import (
    list_replica,
)
from walship.replica.restore_front import progress_bar
from walship.replica.sqlite import connections_to
from walship.replica.store.settings import DEFAULT_PART_SIZE, S3Settings
from walship.replica.timeline import MarkedPoint, Timeline, read_timeline
from walship.replica.verify import in_words, remember, verify

__all__ = ["run_doctor", "run_ltx", "run_timeline", "run_unmark", "run_verify"]


def run_verify(arguments: argparse.Namespace, clock: Clock) -> int:
    replica, path = replica_of(arguments)
    directory = None if path is None else state_directory_of(arguments, path)
    if path is not None and connections_to(str(path)):
        raise ConfigError(
            f"this process has {path} open: use walship.replication({path.name!r}).verify() here"
        )
    scratch = arguments.scratch or (tempfile.gettempdir() if path is None else path.parent)
    if not os.path.isdir(scratch):
        raise ConfigError(f"-scratch: there is no directory {scratch}")
    name = "replica" if path is None else path.name
    with opened(replica, clock) as store, progress_bar(name) as progress:
        found = verify(
            store,
            clock,
            Path(scratch, f".{name}-verify"),
            database=path,
            directory=directory,
            parallelism=arguments.parallelism,
            progress=progress,
        )
    if directory is not None:
        remember(directory, found)
    if arguments.json:
        print_json(
            {
                **asdict(found),
                "txid": None if found.txid is None else format_txid(found.txid),
                "time": timestamp(found.time_ms),
            }
        )
    else:
        say(in_words(found))
    return VERIFY_CODES[found.outcome]


def run_ltx(arguments: argparse.Namespace, clock: Clock) -> int:
    if arguments.command == "wal":
        say("warning: `walship wal` is now called `walship ltx`")
    replica, _ = replica_of(arguments)
    with opened(replica, clock) as store:
        segments = list_replica(store, arguments.level)
    if arguments.json:
        print_json([segment_json(each) for each in segments])
        return EXIT_OK
    rows = [
        [
            str(each.level),
            format_txid(each.min_txid),
            format_txid(each.max_txid),
            str(each.size_bytes),
            timestamp(each.created_ms),
        ]
        for each in segments
    ]
    print_table(["level", "min_txid", "max_txid", "size", "created"], rows)
    return EXIT_OK


def run_timeline(arguments: argparse.Namespace, clock: Clock) -> int:
    replica, _ = replica_of(arguments)
    with opened(replica, clock) as store:
        found = read_timeline(store)
    if found.warning:
        say(f"warning: {found.warning}")
    if found.gap is not None:
        say(f"warning: TXIDs {found.gap} are missing; what follows cannot be restored")
    if arguments.json:
        print_json(_timeline_json(found))
        return EXIT_OK
    rows = [
        [
            format_txid(each.min_txid),
            format_txid(each.max_txid),
            timestamp(each.from_ms),
            timestamp(each.to_ms),
            str(each.n_points),
            _granularity(each.level),
            human_duration(each.step_ms),
        ]
        for each in found.stretches
    ]
    headings = ["from txid", "to txid", "from", "to", "states", "restorable", "longest step"]
    print_table(headings, rows)
    if found.marks:
        print()
        rows = [
            [
                each.mark.label,
                format_txid(each.mark.txid),
                timestamp(each.mark.time_ms),
                "yes" if each.exact else f"no{_nearest_of(each)}",
            ]
            for each in found.marks
        ]
        print_table(["mark", "txid", "marked", "restorable"], rows)
    return EXIT_OK


def _granularity(level: int) -> str:
    if level == 0:
        return "each upload"
    return "snapshots" if level == LEVEL_MAX else f"steps of level {level}"


def _nearest_of(point: MarkedPoint) -> str:
    nearest = [format_txid(txid) for txid in (point.below, point.above) if txid is not None]
    return f"; nearest: {' and '.join(nearest)}" if nearest else ""


def _timeline_json(found: Timeline) -> dict[str, object]:
    return {
        "replica": found.replica,
        "ranges": [
            {
                "level": each.level,
                "min_txid": format_txid(each.min_txid),
                "max_txid": format_txid(each.max_txid),
                "from": format_time(each.from_ms),
                "to": format_time(each.to_ms),
                "states": each.n_points,
                "longest_step_ms": each.step_ms,
            }
            for each in found.stretches
        ],
        "missing": None
        if found.gap is None
        else {
            "min_txid": format_txid(found.gap.min_txid),
            "max_txid": format_txid(found.gap.max_txid),
        },
        "marks": [
            {
                "label": each.mark.label,
                "txid": format_txid(each.mark.txid),
                "time": format_time(each.mark.time_ms),
                "restorable": each.exact,
                "nearest_txids": [
                    format_txid(txid) for txid in (each.below, each.above) if txid is not None
                ],
            }
            for each in found.marks
        ],
    }


def run_unmark(arguments: argparse.Namespace, clock: Clock) -> int:
    replica, _ = replica_of(arguments)
    with opened(replica, clock) as store:
        mark = remove_mark(store, arguments.label)
    say(f"the mark {mark.label!r} at TXID {format_txid(mark.txid)} is removed")
    return EXIT_OK


def run_doctor(arguments: argparse.Namespace, clock: Clock) -> int:
    replica, _ = replica_of(arguments)
    settings = replica.store
    part_size = settings.part_size if isinstance(settings, S3Settings) else DEFAULT_PART_SIZE
    with opened(replica, clock) as store:
        if arguments.json:
            report = probe(store, clock, part_size=part_size)
            print_json(as_json(report, notes_about(report, settings)))
        else:
            printer = Printer(sys.stdout)
            printer.title(store.url)
            try:
                report = probe(
                    store,
                    clock,
                    part_size=part_size,
                    started=printer.started,
                    ended=printer.ended,
                )
            finally:
                printer.stopped()
            printer.verdict(report, notes_about(report, settings))
    return EXIT_OK if report.fit else EXIT_UNFIT
