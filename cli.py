"""The ``walship`` command: restore, look at replicas, look at databases.

Arguments come in here and exit codes go out; the work is done by the modules below.  Standard
output carries results only, so that ``-json`` can be read by a program; messages and the progress
bar go to standard error.  Expected errors are one line; a traceback means a bug.

Replication happens in the application which opens its database through walship; `replicate` is for
those that do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn

from walship import __version__
from walship.replica.clock import Clock, SystemClock
from walship.replica.config import (
    CONFIG_PLACES,
    Settings,
    database_settings,
    default_replica,
    find_config,
    load_config,
    log_level,
    parse_replica,
)
from walship.replica.config_file import SocketSettings
from walship.replica.doctor.probe import probe
from walship.replica.doctor.report import Printer, as_json, notes_about
from walship.replica.errors import (
    ConfigError,
    ContinuityError,
    FormatError,
    GapError,
    IntegrityError,
    NoBackupError,
    OutputExistsError,
    ReplicaError,
    StoreError,
)
from walship.replica.follow import Step, follow, update
from walship.replica.format.types import LEVEL_MAX, format_segment_name, format_txid, parse_txid
from walship.replica.marks import remove_mark
from walship.replica.overview import Overview, ask_running, look_at
from walship.replica.plan import format_time
from walship.replica.process import started_ms
from walship.replica.reset import reset
from walship.replica.restore import (
    RestoreResult,
    Source,
    find_source,
    list_replica,
    restore,
)
from walship.replica.restore_front import labelled, parse_time, progress_bar, refuse_replicated
from walship.replica.settings import DatabaseSettings, ReplicaSettings, database_path
from walship.replica.spool import state_directory
from walship.replica.sqlite import connections_to
from walship.replica.store.base import ObjectStore, SegmentInfo
from walship.replica.store.opening import open_store
from walship.replica.store.retrying import RetryingStore
from walship.replica.store.settings import DEFAULT_PART_SIZE, LocalSettings, S3Settings
from walship.replica.timeline import MarkedPoint, Timeline, read_timeline
from walship.replica.url import is_url
from walship.replica.values import parse_duration
from walship.replica.verify import in_words, last_verified, remember, verify
from walship.sidecar.commands import control, replicate, socket_of
from walship.sidecar.control import DEFAULT_PATH

__all__ = ["main"]

EXIT_OK: Final = 0
EXIT_OTHER: Final = 1
EXIT_NO_BACKUP: Final = 3
EXIT_DAMAGED: Final = 4
EXIT_STORE: Final = 5
EXIT_GAP: Final = 6
EXIT_EXISTS: Final = 7
EXIT_UNFIT: Final = 8
EXIT_DIFFERS: Final = 9
EXIT_INTERRUPTED: Final = 130
EXIT_TERMINATED: Final = 143
#: For `main` alone: a signal has ended what would not end otherwise.  Its exit code is 0.
_ENDED: Final = -1

#: The first class that fits decides.
_EXIT_CODES: Final[tuple[tuple[type[ReplicaError], int], ...]] = (
    (NoBackupError, EXIT_NO_BACKUP),
    (IntegrityError, EXIT_DAMAGED),
    (FormatError, EXIT_DAMAGED),
    (StoreError, EXIT_STORE),
    (GapError, EXIT_GAP),
    (ContinuityError, EXIT_GAP),
    (OutputExistsError, EXIT_EXISTS),
)

_VERIFY_CODES: Final[Mapping[str, int]] = {
    "sound": EXIT_OK,
    "differs": EXIT_DIFFERS,
    "damaged": EXIT_DAMAGED,
}

_EXIT_HELP: Final = """\
exit codes:
  0    done (also: nothing to do, with -if-db-not-exists or -if-replica-exists; restore -f was ended
       by a signal)
  1    wrong usage or configuration, or any other error
  3    no backup that fits
  4    the replica is damaged, or the restored database fails SQLite's check
  5    the store cannot be reached, or refuses
  6    segments are missing in the middle of the replica; copy and replica do not fit
  7    the output exists already
  8    the store is not fit (doctor)
  9    the replica can be restored, and is not the database (verify)
  130  interrupted (Ctrl-C); nothing was changed
"""

_MAIN_HELP: Final = f"""\
examples:
  walship restore -o app.db 's3://bucket/app.db?endpoint=fly.storage.tigris.dev&region=auto'
  walship restore -config walship.yml /data/app.db
  walship ltx -level all 's3://bucket/app.db'
  walship status
  walship timeline 's3://bucket/app.db'
  walship verify -config walship.yml /data/app.db
  walship doctor 's3://bucket/app.db'

Quote a URL that contains "&", or the shell cuts it there.  Keys come from the environment
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or the configuration file.  That is the one of -config,
else of WALSHIP_CONFIG or LITESTREAM_CONFIG, else the first that exists of
{", ".join(CONFIG_PLACES)}.

{_EXIT_HELP}"""

_RESTORE_HELP: Final = f"""\
What to restore is a database of the configuration file, or a replica: a URL or a directory.
Without a configuration file a database is restored from the replica that WALSHIP_REPLICA names.

examples:
  the newest state:
    walship restore -o app.db s3://bucket/app.db
  an earlier one:
    walship restore -o app.db -timestamp 2026-01-31T15:54:00Z s3://bucket/app.db
    walship restore -o app.db -timestamp -15m s3://bucket/app.db
    walship restore -o app.db -txid 00000000000000a7 s3://bucket/app.db
    walship restore -o app.db -label before-migration s3://bucket/app.db
  which there are:
    walship timeline s3://bucket/app.db
  at the start of a container, where either side may be missing:
    walship restore -if-db-not-exists -if-replica-exists -config walship.yml /data/app.db
  what would be fetched:
    walship restore -dry-run -o app.db s3://bucket/app.db

  keep a copy up to date, now and then or all the time:
    walship restore -delta -o copy.db s3://bucket/app.db
    walship restore -f -o copy.db s3://bucket/app.db

The database appears under its name complete and checked, or not at all; until then nothing that
exists is touched, not even with -force.

-delta and -f go on from the TXID in OUTPUT-txid, which they write beside the output.  Programs may
read the output meanwhile and see each state whole; none may write to it.  Killed at any point they
leave a state of the replica.  -f ends with exit code 0 at SIGTERM or Ctrl-C.  It looks for new
segments every second, or -follow-interval: one LIST request, 2.6 million in 30 days at 1s (about 13
USD at the prices of S3), and two HEADs and a GET for each new segment.

{_EXIT_HELP}"""

_VERIFY_HELP: Final = f"""\
Restores the newest state to a scratch file, has SQLite check it in full, and removes the file.  For
a database on this machine all pages are also compared with its own, as they were at the same TXID;
applications may go on using it.  Without one, or where that is not possible, it says so.

examples:
  the replica of a database, compared with it:
    walship verify -config walship.yml /data/app.db
  a replica alone, from any machine:
    walship verify s3://bucket/app.db

{_EXIT_HELP}"""

_DOCTOR_HELP: Final = f"""\
Writes, reads and removes objects named walship-doctor-... where a replica's would lie, and lets
writers race for one of them: only that shows whether a second writer would be kept out.  About
2,000 requests and 20 MB; from a few seconds to a minute.  Replicas there are not touched.

{_EXIT_HELP}"""

#: Commands of Litestream that somebody may type here.
_REPLICATE_HELP: Final = f"""\
For databases that other programs write to with SQLite as it comes.  An application in Python needs
no such program: it opens its database with walship.connect(path, replica=...).

examples:
  walship replicate /data/app.db 's3://bucket/app.db?endpoint=fly.storage.tigris.dev&region=auto'
  walship replicate -config walship.yml
  walship replicate -restore-if-db-not-exists -exec "gunicorn app:app" -config walship.yml

SIGTERM and Ctrl-C ship what is there, then end; a second one ends at once.  SIGHUP reads the
configuration again.  The databases are put into WAL mode, and their checkpoints happen here: others
may start them, but the WAL is only begun anew when everything in it is safe.

{_EXIT_HELP}"""

#: Commands to a running ``walship replicate``, and what they do.
_CONTROLS: Final[Mapping[str, str]] = {
    "sync": "ship what is there now",
    "register": "replicate one more database, until the program ends",
    "unregister": "replicate a database no more",
    "start": "go on with a database that was stopped",
    "stop": "ship what a database has, and pause",
}

_ELSEWHERE: Final[Mapping[str, str]] = {
    "snapshots": "there are no separate snapshots any more; `walship ltx -level 9` lists them",
    "generations": "there are no generations any more; `walship ltx -level all` lists the replica",
    "mcp": "there is no MCP server; the commands print JSON with -json (see `walship -h`)",
}

#: How long `status` waits for a process that has the database open, seconds.
_ASK_S: Final = 1.0
#: States of a running database in the words that Litestream's `list` has for them.
_LIST_STATES: Final[Mapping[str, str]] = {
    "opening": "open",
    "ok": "replicating",
    "retrying": "replicating",
}

_RELATIVE_RE: Final = re.compile(r"-\s*\d")


class _Terminated(KeyboardInterrupt):
    """SIGTERM: clean up as for Ctrl-C."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each option in one spelling."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs == 0:
            return action.option_strings[0]
        default = self._get_default_metavar_for_optional(action)
        return f"{action.option_strings[0]} {self._format_args(action, default)}"


class _Parser(argparse.ArgumentParser):
    """Options with one dash or two, usage errors as one line with exit code 1."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (`{self.prog} -h` shows what there is)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; without ``argv`` as a program of its own."""
    as_program = argv is None
    words = _joined(sys.argv[1:] if argv is None else argv)
    if as_program:
        signal.signal(signal.SIGTERM, _terminate)
    code = _run(words, SystemClock())
    by_signal = code in (EXIT_INTERRUPTED, EXIT_TERMINATED, _ENDED)
    if code == _ENDED:
        code = EXIT_OK
    if as_program and by_signal:
        # Threads may still wait for a server; nothing they do matters any more.
        sys.stderr.flush()
        os._exit(code)
    return code


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _run(words: Sequence[str], clock: Clock) -> int:
    logging.captureWarnings(True)
    handler = logging.StreamHandler()
    handler.setFormatter(_MessageFormatter())
    logger = logging.getLogger("walship")
    previous = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    command = ""
    arguments: argparse.Namespace | None = None
    try:
        if words and words[0] in _ELSEWHERE:
            raise ConfigError(f"{words[0]}: {_ELSEWHERE[words[0]]}")
        parser = _parser()
        arguments = parser.parse_args(words)
        command = arguments.command or ""
        if not command:
            parser.print_help(sys.stderr)
            return EXIT_OTHER
        code: int = arguments.run(arguments, clock)
        sys.stdout.flush()
        return code
    except ReplicaError as error:
        _say(_one_line(error) + _hint(words))
        return _exit_code(error)
    except _Terminated:
        _say("terminated; no database or replica was changed")
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        _say("interrupted; no database or replica was changed")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough.  Nothing must be flushed into the pipe later.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OTHER
    except SystemExit as stop:  # argparse, after printing help
        return int(stop.code or 0)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous[0])
        logger.propagate = previous[1]
        logging.captureWarnings(False)


def _exit_code(error: ReplicaError) -> int:
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), EXIT_OTHER)


class _MessageFormatter(logging.Formatter):
    """One line for each message, as everything else here."""

    def format(self, record: logging.LogRecord) -> str:
        return f"walship: {record.levelname.lower()}: {record.getMessage()}"


def _say(message: str) -> None:
    print(f"walship: {message}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _hint(words: Sequence[str]) -> str:
    """A shell that saw an unquoted ``&`` has run us with the first part of the URL."""
    for word in words:
        if not is_url(word):
            continue
        query = word.partition("?")[2]
        has_endpoint, has_region = (
            re.search(rf"(?:^|&){name}=", query) for name in ("endpoint", "region")
        )
        if has_endpoint and not has_region:
            missing = "an endpoint and no region"
        elif has_region and not has_endpoint and "&" not in query:
            missing = "a region and no endpoint"
        else:
            continue
        return (
            f" (the URL names {missing}: if it has an & in it, put it in quotes, or the shell cuts"
            " it there)"
        )
    return ""


# --- arguments -----------------------------------------------------------------------------------


def _joined(words: Sequence[str]) -> list[str]:
    """Write ``-timestamp -15m`` as one word: the parser takes the second for an option."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("-timestamp", "--timestamp") and _RELATIVE_RE.match(word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _option(parser: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """Add an option that is spelled with one dash or with two."""
    parser.add_argument(f"-{name}", f"--{name}", **settings)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="walship",
        description="Restores SQLite databases from replicas and looks at replicas and databases.",
        epilog=_MAIN_HELP,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    _option(parser, "version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(
        name: str,
        run: Callable[[argparse.Namespace, Clock], int],
        summary: str,
        *,
        epilog: str = _EXIT_HELP,
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(run=run)
        return made

    made = command("restore", _restore, "restore a database from its replica", epilog=_RESTORE_HELP)
    _target(made)
    _config(made)
    made.add_argument("-o", "--o", "--output", metavar="PATH", help="the database file to write")
    _option(made, "txid", metavar="TXID", help="restore exactly this TXID (16 hex digits)")
    _option(
        made,
        "timestamp",
        metavar="TIME",
        help="restore the newest state before this time: RFC 3339, or relative"
        ' ("-15m", "5 minutes ago")',
    )
    _option(made, "label", metavar="NAME", help="restore the state that was marked with this name")
    _option(
        made,
        "parallelism",
        metavar="N",
        type=_at_least_one,
        default=8,
        help="requests under way at once (8)",
    )
    _option(
        made,
        "integrity-check",
        choices=["none", "quick", "full"],
        default="none",
        help="have SQLite check the database before it gets its name (none)",
    )
    _option(
        made,
        "verify",
        choices=["auto", "full"],
        default="auto",
        help="full: also read and verify the outdated parts of large segments (auto)",
    )
    _option(made, "force", action="store_true", help="replace an existing database")
    _option(
        made,
        "if-db-not-exists",
        action="store_true",
        help="do nothing, successfully, if the output exists",
    )
    _option(
        made,
        "if-replica-exists",
        action="store_true",
        help="do nothing, successfully, if there is no backup",
    )
    _option(
        made,
        "delta",
        action="store_true",
        help="bring the output, made with -delta or -f before, up to date: fetch what changed",
    )
    made.add_argument("-f", "--f", action="store_true", help="follow the replica until stopped")
    _option(
        made,
        "follow-interval",
        metavar="DURATION",
        default="1s",
        help="time between two looks with -f; each is one LIST request (1s)",
    )
    _option(made, "dry-run", action="store_true", help="print what would be fetched, fetch nothing")
    _json(made)

    made = command(
        "verify",
        _verify,
        "restore a replica for trial, check it, and compare it with the database",
        epilog=_VERIFY_HELP,
    )
    _target(made)
    _config(made)
    _option(
        made,
        "scratch",
        metavar="DIR",
        help="where there is room for the scratch file, which is as large as the database (beside"
        " the database; for a replica alone, the directory for temporary files)",
    )
    _option(
        made,
        "parallelism",
        metavar="N",
        type=_at_least_one,
        default=8,
        help="requests under way at once (8)",
    )
    _json(made)

    for name in ("ltx", "wal"):
        summary = "list the segments of a replica"
        if name == "wal":
            summary += " (the old name of ltx)"
        made = command(name, _ltx, summary)
        _target(made)
        _config(made)
        _option(
            made,
            "level",
            metavar="LEVEL",
            type=_levels,
            default=_levels("0"),
            help="0 fresh, 1 to 8 compacted, 9 snapshots, or all (0)",
        )
        _json(made)

    made = command("timeline", _timeline, "show which states can be restored, and the marks")
    _target(made)
    _config(made)
    _json(made)

    made = command("unmark", _unmark, "remove a mark: retention need not keep its state any more")
    _target(made)
    made.add_argument("label", metavar="NAME", help="the mark")
    _config(made)

    made = command(
        "replicate",
        _replicate,
        "replicate databases whose applications do not use walship themselves",
        epilog=_REPLICATE_HELP,
    )
    made.add_argument("database", metavar="DB", nargs="?", help="a database file")
    made.add_argument("replica", metavar="REPLICA", nargs="?", help="its replica's URL")
    _config(made)
    _option(made, "exec", metavar="COMMAND", help="run this beside it, and end when it has ended")
    _option(made, "once", action="store_true", help="ship what is there, and end")
    _option(made, "force-snapshot", action="store_true", help="with -once: then make a snapshot")
    _option(
        made,
        "enforce-retention",
        action="store_true",
        help="with -once: then merge and remove what is due",
    )
    _option(
        made,
        "restore-if-db-not-exists",
        action="store_true",
        help="first restore a database whose file is missing, if its replica has data",
    )
    _option(made, "socket", metavar="PATH", help="make a control socket there")
    _log_level(made)

    for name, does in _CONTROLS.items():
        made = command(name, _control, does)
        made.add_argument("database", metavar="DB", help="a database file")
        if name == "register":
            _option(made, "replica", metavar="URL", required=True, help="its replica's URL")
        if name == "sync":
            _option(made, "wait", action="store_true", help="until the replica has it")
        _config(made)
        _socket(made)
        _option(
            made,
            "timeout",
            metavar="SECONDS",
            type=_at_least_one,
            default=30,
            help="how long to wait (30)",
        )
        _json(made)

    made = command("databases", _databases, "list the databases of the configuration file")
    _config(made)
    _json(made)

    made = command("info", _info, "show the processes that have databases of the file open")
    _running(made)

    made = command("list", _list, "list the databases of the file, and which are being replicated")
    _running(made)

    made = command("status", _status, "show local databases and how far their replicas are")
    made.add_argument("database", metavar="DB", nargs="?", help="only this database")
    _config(made)
    _json(made)

    made = command(
        "reset",
        _reset,
        "forget what is recorded beside a database: it becomes its replica's next state",
    )
    made.add_argument("database", metavar="DB", help="the database; no process may have it open")
    _config(made)

    made = command(
        "doctor", _doctor, "try out a store: is it fit for replicas?", epilog=_DOCTOR_HELP
    )
    _target(made)
    _config(made)
    _json(made)

    made = command("version", _version, "print the version")
    _option(made, "verbose", action="store_true", help="also those of what it runs on")
    return parser


def _target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="DB|REPLICA", help="a database, or a URL or directory")


def _config(parser: argparse.ArgumentParser) -> None:
    _option(
        parser,
        "config",
        metavar="PATH",
        help="the configuration file (see `walship -h` for where it is looked for)",
    )
    _option(
        parser,
        "no-expand-env",
        action="store_true",
        help="do not replace $NAME in the configuration file",
    )
    _option(
        parser,
        "strict",
        action="store_true",
        help="an unknown key in the configuration file is an error",
    )


def _socket(parser: argparse.ArgumentParser) -> None:
    _option(
        parser,
        "socket",
        metavar="PATH",
        help=f"the control socket of `walship replicate` (as configured, or {DEFAULT_PATH})",
    )


def _log_level(parser: argparse.ArgumentParser) -> None:
    _option(
        parser,
        "log-level",
        metavar="LEVEL",
        choices=["debug", "info", "warn", "error"],
        help="how much to say (as configured, or info)",
    )


def _running(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    _option(
        parser,
        "timeout",
        metavar="SECONDS",
        type=_at_least_one,
        default=1,
        help="how long to wait for the answer of each process (1)",
    )
    _option(
        parser,
        "socket",
        metavar="PATH",
        help="ask `walship replicate` on this control socket instead",
    )
    _json(parser)


def _json(parser: argparse.ArgumentParser) -> None:
    _option(parser, "json", action="store_true", help="print JSON")


def _at_least_one(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on is expected, not {text!r}")
    return int(text)


def _levels(text: str) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(LEVEL_MAX + 1))
    if re.fullmatch(r"[0-9]", text) is None:
        raise argparse.ArgumentTypeError(f"0 to {LEVEL_MAX} or all is expected, not {text!r}")
    return (int(text),)


def _parse_txid(text: str) -> int:
    try:
        return parse_txid(text.lower())
    except FormatError:
        raise ConfigError(f"-txid: 16 hex digits are expected, not {text!r}") from None


# --- what is meant -------------------------------------------------------------------------------


def _load(arguments: argparse.Namespace) -> tuple[Settings, Path] | None:
    """The configuration file that is meant, read; None if there is none."""
    file = find_config() if arguments.config is None else Path(arguments.config)
    if file is None:
        return None
    expand_env = not arguments.no_expand_env
    return load_config(file, expand_env=expand_env, strict=arguments.strict), file


def _replica_of(arguments: argparse.Namespace) -> tuple[ReplicaSettings, Path | None]:
    """The replica that DB|REPLICA means, and the database if it is one."""
    target: str = arguments.target
    if is_url(target) and not target.startswith(("sqlite:", "sqlite3:")):
        if arguments.config is not None:
            raise ConfigError("a replica URL and -config exclude each other: drop one of them")
        return parse_replica(target), None
    if arguments.config is None and os.path.isdir(target):
        return parse_replica(target), None
    database = _in_file(arguments, target)
    if database is not None:
        return _its_replica(database), database.path
    replica = default_replica()
    if replica is None:
        raise ConfigError(
            f"where is the replica of {database_path(target)}? Give -config FILE, a replica URL in"
            " place of the database, or set WALSHIP_REPLICA"
        )
    return replica, database_path(target)


def _in_file(arguments: argparse.Namespace, path: str) -> DatabaseSettings | None:
    """The settings of a database in the configuration file.

    None without a file, and also if it does not have them, but the environment has a replica and
    the file was not named here.
    """
    loaded = _load(arguments)
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


def _its_replica(database: DatabaseSettings) -> ReplicaSettings:
    if database.replica is None:
        raise ConfigError(f"{database.path} has no replica in the configuration file")
    return database.replica


@contextlib.contextmanager
def _opened(replica: ReplicaSettings, clock: Clock) -> Iterator[ObjectStore]:
    with closing(RetryingStore(open_store(replica.store, clock), clock)) as store:
        yield store


def _kind(replica: ReplicaSettings) -> str:
    return "file" if isinstance(replica.store, LocalSettings) else "s3"


# --- commands ------------------------------------------------------------------------------------


def _restore(arguments: argparse.Namespace, clock: Clock) -> int:
    txid = None if arguments.txid is None else _parse_txid(arguments.txid)
    timestamp_ms = None
    if arguments.timestamp is not None:
        timestamp_ms = parse_time(arguments.timestamp, clock.now_ms())
    replica, database = _replica_of(arguments)
    if arguments.o is not None:
        output = Path(arguments.o)
    elif database is not None:
        output = database
    else:
        raise ConfigError(f"where to? Try: walship restore -o app.db '{arguments.target}'")
    kept_up = arguments.f or arguments.delta
    if kept_up:
        _check_kept_up(arguments, output)
    if arguments.if_db_not_exists and output.exists() and output.stat().st_size > 0:
        _say(f"{output} exists already, nothing to do")
        return EXIT_OK
    with _opened(replica, clock) as store:
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
                with progress_bar(output.name) as progress:
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
            _say(f"{_one_line(error)}; nothing to do")
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
            _say(
                f"{output} holds TXID {format_txid(step.txid)}: fetched"
                f" {_human_size(step.size_bytes)} in {step.n_segments} segment(s), wrote"
                f" {step.n_pages} page(s)"
            )
        return EXIT_OK
    interval_s = parse_duration("-follow-interval", arguments.follow_interval)
    reached = 0

    def note(step: Step) -> None:
        nonlocal reached
        if not reached:
            _say(
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
        _say(f"ended; {output} holds TXID {format_txid(reached)} at least")
    return _ENDED


def _report(result: RestoreResult, output: Path, replica: ReplicaSettings, as_json: bool) -> None:
    txid = None if result.txid is None else format_txid(result.txid)
    if as_json:
        _print_json(
            {
                "db_path": str(output),
                "replica": _kind(replica),
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
    size = _human_size(result.page_size * result.commit)
    state = "a replica of Litestream 0.3" if txid is None else f"TXID {txid}"
    _say(
        f"restored {output} from {state}: {size} in {result.duration_s:.1f} s, fetched"
        f" {_human_size(result.bytes_fetched)} in {result.n_segments} segment(s)"
    )


def _print_source(
    source: Source, store: ObjectStore, replica: ReplicaSettings, output: Path, as_json: bool
) -> None:
    if source.plan is not None:
        files = [_segment_json(each, named=True) for each in source.plan.segments]
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
                "timestamp": _timestamp(each.info.modified_ms),
            }
            for each in (source.v03.snapshot, *source.v03.wal)
        ]
        min_txid = max_txid = None
        warnings = ()
    for warning in warnings:
        _say(f"warning: {warning}")
    if as_json:
        _print_json(
            {
                "source": store.url,
                "target_path": str(output),
                "replica": _kind(replica),
                "min_txid": min_txid,
                "max_txid": max_txid,
                "files": files,
            }
        )
        return
    print("Restore plan:")
    print(f"  source: {store.url}")
    print(f"  target: {output}")
    print(f"  replica: {_kind(replica)}")
    if min_txid is not None:
        print(f"  txid range: {min_txid} - {max_txid}")
    print("\nFiles to fetch:")
    columns = ["level", "name", "min_txid", "max_txid", "size", "timestamp"]
    headings = ["level", "file", *columns[2:]]
    _print_table(headings, [["-" if f[c] is None else str(f[c]) for c in columns] for f in files])


def _verify(arguments: argparse.Namespace, clock: Clock) -> int:
    replica, path = _replica_of(arguments)
    directory = None if path is None else _state_directory(arguments, path)
    if path is not None and connections_to(str(path)):
        raise ConfigError(
            f"this process has {path} open: use walship.replication({path.name!r}).verify() here"
        )
    scratch = arguments.scratch or (tempfile.gettempdir() if path is None else path.parent)
    if not os.path.isdir(scratch):
        raise ConfigError(f"-scratch: there is no directory {scratch}")
    name = "replica" if path is None else path.name
    with _opened(replica, clock) as store, progress_bar(name) as progress:
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
        _print_json(
            {
                **asdict(found),
                "txid": None if found.txid is None else format_txid(found.txid),
                "time": _timestamp(found.time_ms),
            }
        )
    else:
        _say(in_words(found))
    return _VERIFY_CODES[found.outcome]


def _state_directory(arguments: argparse.Namespace, path: Path) -> Path:
    loaded = _load(arguments)
    database = loaded[0].database(str(path)) if loaded is not None else None
    return state_directory(path) if database is None else database.meta_path


def _ltx(arguments: argparse.Namespace, clock: Clock) -> int:
    if arguments.command == "wal":
        _say("warning: `walship wal` is now called `walship ltx`")
    replica, _ = _replica_of(arguments)
    with _opened(replica, clock) as store:
        segments = list_replica(store, arguments.level)
    if arguments.json:
        _print_json([_segment_json(each) for each in segments])
        return EXIT_OK
    rows = [
        [
            str(each.level),
            format_txid(each.min_txid),
            format_txid(each.max_txid),
            str(each.size_bytes),
            _timestamp(each.created_ms),
        ]
        for each in segments
    ]
    _print_table(["level", "min_txid", "max_txid", "size", "created"], rows)
    return EXIT_OK


def _timeline(arguments: argparse.Namespace, clock: Clock) -> int:
    replica, _ = _replica_of(arguments)
    with _opened(replica, clock) as store:
        found = read_timeline(store)
    if found.warning:
        _say(f"warning: {found.warning}")
    if found.gap is not None:
        _say(f"warning: TXIDs {found.gap} are missing; what follows cannot be restored")
    if arguments.json:
        _print_json(_timeline_json(found))
        return EXIT_OK
    rows = [
        [
            format_txid(each.min_txid),
            format_txid(each.max_txid),
            _timestamp(each.from_ms),
            _timestamp(each.to_ms),
            str(each.n_points),
            _granularity(each.level),
            _human_duration(each.step_ms),
        ]
        for each in found.stretches
    ]
    headings = ["from txid", "to txid", "from", "to", "states", "restorable", "longest step"]
    _print_table(headings, rows)
    if found.marks:
        print()
        rows = [
            [
                each.mark.label,
                format_txid(each.mark.txid),
                _timestamp(each.mark.time_ms),
                "yes" if each.exact else f"no{_nearest_of(each)}",
            ]
            for each in found.marks
        ]
        _print_table(["mark", "txid", "marked", "restorable"], rows)
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


def _unmark(arguments: argparse.Namespace, clock: Clock) -> int:
    replica, _ = _replica_of(arguments)
    with _opened(replica, clock) as store:
        mark = remove_mark(store, arguments.label)
    _say(f"the mark {mark.label!r} at TXID {format_txid(mark.txid)} is removed")
    return EXIT_OK


def _segment_json(segment: SegmentInfo, *, named: bool = False) -> dict[str, object]:
    fields: dict[str, object] = {"level": segment.level}
    if named:
        fields["name"] = format_segment_name(segment.min_txid, segment.max_txid)
    fields["min_txid"] = format_txid(segment.min_txid)
    fields["max_txid"] = format_txid(segment.max_txid)
    fields["size"] = segment.size_bytes
    fields["timestamp"] = _timestamp(segment.created_ms)
    return fields


def _required_config(arguments: argparse.Namespace) -> tuple[Settings, Path]:
    loaded = _load(arguments)
    if loaded is None:
        raise ConfigError(
            f"which databases? Try: walship {arguments.command} -config walship.yml (looked for:"
            f" {', '.join(CONFIG_PLACES)})"
        )
    return loaded


def _replicate(arguments: argparse.Namespace, clock: Clock) -> int:
    if arguments.database is not None and arguments.replica is None:
        raise ConfigError(
            f"where to? Try: walship replicate {arguments.database} s3://bucket/path (or name the"
            " database in a configuration file, and give no argument)"
        )
    if arguments.database is not None and arguments.config is not None:
        raise ConfigError("DB REPLICA and -config exclude each other: drop one of them")

    def read() -> Settings:
        if arguments.database is None:
            settings, _ = _required_config(arguments)
        else:
            path = database_path(arguments.database)
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


def _control(arguments: argparse.Namespace, clock: Clock) -> int:
    loaded = None if arguments.socket is not None else _load(arguments)
    socket = socket_of(arguments.socket, None if loaded is None else loaded[0])
    fields: dict[str, object] = {"path": str(database_path(arguments.database))}
    if arguments.command == "register":
        fields["replica_url"] = arguments.replica
    if arguments.command == "sync":
        fields["wait"] = arguments.wait
    answer = control(socket, arguments.command, arguments.timeout, **fields)
    if arguments.json:
        _print_json(answer)
        return EXIT_OK
    txids = [f"{name} {format_txid(answer[name])}" for name in _TXIDS if name in answer]
    print(", ".join([f"{answer['path']}: {answer['status']}", *txids]))
    return EXIT_OK


_TXIDS: Final = ("txid", "replicated_txid")


def _databases(arguments: argparse.Namespace, clock: Clock) -> int:
    # This is the command that looks at the file: it also says what is not needed in there.
    logging.getLogger("walship").setLevel(logging.INFO)
    settings, _ = _required_config(arguments)
    for directory in settings.directories:
        if not directory.directory.is_dir():
            _say(f"warning: there is no directory {directory.directory}")
    rows = [
        [str(each.path), "-" if each.replica is None else _kind(each.replica)]
        for each in settings.all_databases()
    ]
    if arguments.json:
        _print_json([{"path": path, "replica": replica} for path, replica in rows])
    else:
        _print_table(["path", "replica"], rows)
    return EXIT_OK


def _list(arguments: argparse.Namespace, clock: Clock) -> int:
    if arguments.socket is not None:
        answer = control(arguments.socket, "list", arguments.timeout)
        return _print_list(arguments, answer["databases"])
    settings, _ = _required_config(arguments)
    rows = []
    for database in settings.all_databases():
        running = ask_running(database.meta_path, arguments.timeout)
        row = {"path": str(database.path), "status": "stopped"}
        if running is not None:
            row["status"] = _LIST_STATES.get(running.state, "stopped")
            if running.last_upload_ms is not None:
                row["last_sync_at"] = _timestamp(running.last_upload_ms)
        rows.append(row)
    return _print_list(arguments, rows)


def _print_list(arguments: argparse.Namespace, rows: Sequence[Mapping[str, object]]) -> int:
    if arguments.json:
        _print_json({"databases": rows})
        return EXIT_OK
    for row in rows:
        synced = f" (last sync: {row['last_sync_at']})" if "last_sync_at" in row else ""
        print(f"{row['path']} [{row['status']}]{synced}")
    return EXIT_OK


def _info(arguments: argparse.Namespace, clock: Clock) -> int:
    if arguments.socket is not None:
        answer = control(arguments.socket, "info", arguments.timeout)
        if arguments.json:
            _print_json(answer)
            return EXIT_OK
        for name, value in answer.items():
            print(f"{name}: {value}")
        return EXIT_OK
    settings, file = _required_config(arguments)
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
            process["started_at"] = _timestamp(started)
        processes.append(process)
    if arguments.json:
        main = {name: value for name, value in processes[0].items() if name != "databases"}
        count = sum(map(len, by_process.values()))
        _print_json(
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
        loaded = _load(arguments)
        wanted = None if loaded is None else loaded[0].database(arguments.database)
        if wanted is not None:
            return [(wanted.path, wanted.meta_path, wanted.replica)]
        if arguments.config is not None:
            raise ConfigError(f"{arguments.database} is not in {arguments.config}")
        path = database_path(arguments.database)
        return [(path, state_directory(path), default_replica())]
    loaded = _load(arguments)
    if loaded is None:
        raise ConfigError(
            f"which database? Try: walship {arguments.command} app.db, or -config walship.yml"
        )
    return [(each.path, each.meta_path, each.replica) for each in loaded[0].all_databases()]


def _reset(arguments: argparse.Namespace, clock: Clock) -> int:
    for path, directory, _ in _chosen(arguments):
        if not path.exists():
            raise ConfigError(f"there is no database {path}")
        txid = reset(directory, clock)
        before = f" (its record ended at TXID {format_txid(txid)})" if txid else ""
        _say(
            f"{path} was reset{before}: the next open ships a full copy as its replica's next state"
        )
    return EXIT_OK


def _status(arguments: argparse.Namespace, clock: Clock) -> int:
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
            row["last_verified"] = "never" if sound_ms is None else _timestamp(sound_ms)
            code = code or _VERIFY_CODES.get(verified.outcome, EXIT_OK)
            if verified.outcome != "sound":
                row["last_verified"] += f" ({verified.outcome} {_timestamp(verified.time_ms)})"
                _say(f"{path}: verification: {_one_line(ReplicaError(verified.problem))}")
        rows.append(row)
        if error is not None:
            _say(_one_line(error))
            code = code or _exit_code(error)
    if arguments.json:
        _print_json(rows)
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
        _print_table(headings, [[row[name] for name in columns] for row in rows])
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
        "wal_size": "-" if found.wal_bytes is None else _human_size(found.wal_bytes),
    }


def _doctor(arguments: argparse.Namespace, clock: Clock) -> int:
    replica, _ = _replica_of(arguments)
    settings = replica.store
    part_size = settings.part_size if isinstance(settings, S3Settings) else DEFAULT_PART_SIZE
    with _opened(replica, clock) as store:
        if arguments.json:
            report = probe(store, clock, part_size=part_size)
            _print_json(as_json(report, notes_about(report, settings)))
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


def _version(arguments: argparse.Namespace, clock: Clock) -> int:
    if not arguments.verbose:
        print(__version__)
        return EXIT_OK
    import apsw

    print(f"Version:  {__version__}")
    print(f"Python:   {platform.python_implementation()} {platform.python_version()}")
    print(f"SQLite:   {apsw.sqlite_lib_version()} (apsw {apsw.apsw_version()})")
    print(f"OS/Arch:  {platform.system().lower()}/{platform.machine()}")
    return EXIT_OK


# --- printing ------------------------------------------------------------------------------------


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns that line up, the last one ragged."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def _timestamp(timestamp_ms: int) -> str:
    """RFC 3339 to the second, as Litestream prints it."""
    try:
        moment = datetime.fromtimestamp(timestamp_ms // 1000, tz=UTC)
    except (OverflowError, ValueError, OSError):
        return format_time(timestamp_ms)
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def _human_duration(duration_ms: int) -> str:
    """A duration in its two largest units: ``2h 5m``."""
    left = (duration_ms + 999) // 1000
    parts = []
    for unit, seconds in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, seconds)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "-"


def _human_size(n_bytes: int) -> str:
    """Bytes in decimal units: ``4.2 kB``."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    size = float(n_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    return f"{size:.1f} {unit}" if size < 10 else f"{size:.0f} {unit}"


if __name__ == "__main__":
    sys.exit(main())
