"""The ``walship`` command: restore, look at replicas, look at databases.

Arguments come in here and exit codes go out; the work is done by the modules below.  Standard
output carries results only, so that ``-json`` can be read by a program; messages and the progress
bar go to standard error.  Expected errors are one line; a traceback means a bug.

Replication happens in the application which opens its database through walship; `replicate` is for
those that do not.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

from walship import __version__
from walship.commands.exits import (
    ENDED,
    EXIT_HELP,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_OTHER,
    EXIT_TERMINATED,
    exit_code,
)
from walship.commands.options import (
    HelpFormatter,
    Parser,
    add_config,
    add_json,
    add_log_level,
    add_option,
    add_running,
    add_socket,
    add_target,
    at_least_one,
    levels_of,
)
from walship.commands.output import one_line, say
from walship.replica.clock import Clock, SystemClock
from walship.replica.config.sources import (
    CONFIG_PLACES,
)
from walship.replica.config.url import is_url
from walship.replica.errors import (
    ConfigError,
    ReplicaError,
)

__all__ = ["main"]


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

{EXIT_HELP}"""

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

{EXIT_HELP}"""

_VERIFY_HELP: Final = f"""\
Restores the newest state to a scratch file, has SQLite check it in full, and removes the file.  For
a database on this machine all pages are also compared with its own, as they were at the same TXID;
applications may go on using it.  Without one, or where that is not possible, it says so.

examples:
  the replica of a database, compared with it:
    walship verify -config walship.yml /data/app.db
  a replica alone, from any machine:
    walship verify s3://bucket/app.db

{EXIT_HELP}"""

_DOCTOR_HELP: Final = f"""\
Writes, reads and removes objects named walship-doctor-... where a replica's would lie, and lets
writers race for one of them: only that shows whether a second writer would be kept out.  About
2,000 requests and 20 MB; from a few seconds to a minute.  Replicas there are not touched.

{EXIT_HELP}"""

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

{EXIT_HELP}"""

#: Commands to a running ``walship replicate``, and what they do.
_CONTROLS: Final[Mapping[str, str]] = {
    "sync": "ship what is there now",
    "register": "replicate one more database, until the program ends",
    "unregister": "replicate a database no more",
    "start": "go on with a database that was stopped",
    "stop": "ship what a database has, and pause",
}

#: Commands of Litestream that somebody may type here.
_ELSEWHERE: Final[Mapping[str, str]] = {
    "snapshots": "there are no separate snapshots any more; `walship ltx -level 9` lists them",
    "generations": "there are no generations any more; `walship ltx -level all` lists the replica",
    "mcp": "there is no MCP server; the commands print JSON with -json (see `walship -h`)",
}


_RELATIVE_RE: Final = re.compile(r"-\s*\d")


#: Objects that are made before garbage is looked for.  With Python's 700 that happens two hundred
#: times while the S3 SDK is loaded, which leaves none: a sixth of the time of a start.
_GARBAGE_MIN: Final = 20_000


class _Terminated(KeyboardInterrupt):
    """SIGTERM: clean up as for Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; without ``argv`` as a program of its own."""
    as_program = argv is None
    words = _joined(sys.argv[1:] if argv is None else argv)
    if as_program:
        signal.signal(signal.SIGTERM, _terminate)
        gc.set_threshold(_GARBAGE_MIN)
    code = _run(words, SystemClock())
    by_signal = code in (EXIT_INTERRUPTED, EXIT_TERMINATED, ENDED)
    if code == ENDED:
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
        say(one_line(error) + _hint(words))
        return exit_code(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # Whoever read our output has seen enough.  Nothing must be flushed into the pipe later.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            what = f"{error.filename}: " if error.filename is not None else ""
            say(f"{what}{error.strerror or error}")
        return EXIT_OTHER
    except _Terminated:
        say(f"terminated; {_left_behind(command)}")
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        say(f"interrupted; {_left_behind(command)}")
        return EXIT_INTERRUPTED
    except SystemExit as stop:  # argparse, after printing help
        return int(stop.code or 0)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous[0])
        logger.propagate = previous[1]
        logging.captureWarnings(False)


def _left_behind(command: str) -> str:
    if command == "replicate":  # with -once; else signals are handled there
        return "what is not in its replica yet goes out after the next start"
    return "no database or replica was changed"


class _MessageFormatter(logging.Formatter):
    """One line for each message, as everything else here."""

    def format(self, record: logging.LogRecord) -> str:
        return f"walship: {record.levelname.lower()}: {record.getMessage()}"


def _hint(words: Sequence[str]) -> str:
    """A shell that saw an unquoted ``&`` has run us with the first part of the URL."""
    for word in words:
        if not is_url(word):
            continue
        query = word.partition("?")[2]
        has_endpoint, has_region = (
            re.search(rf"(?:^|&){name}=", query) for name in ("endpoint", "region")
        )
        if "&" in query:
            continue
        if has_endpoint and not has_region:
            missing = "an endpoint and no region"
        elif has_region and not has_endpoint:
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


_Run = Callable[[argparse.Namespace, Clock], int]


def _late(module: str, function: str) -> _Run:
    """A command's function, imported when it runs: none needs much of what the others do."""

    def run(arguments: argparse.Namespace, clock: Clock) -> int:
        found: _Run = getattr(importlib.import_module(f"walship.commands.{module}"), function)
        return found(arguments, clock)

    return run


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="walship",
        description="Replicates SQLite databases to object storage, restores and verifies them.",
        epilog=_MAIN_HELP,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_option(parser, "version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(
        name: str,
        run: _Run,
        summary: str,
        *,
        epilog: str = EXIT_HELP,
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:].removesuffix('?')}"
            + ("?" if summary.endswith("?") else "."),
            epilog=epilog,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(run=run)
        return made

    made = command(
        "restore",
        _late("restoring", "run_restore"),
        "restore a database from its replica",
        epilog=_RESTORE_HELP,
    )
    add_target(made)
    add_config(made)
    made.add_argument("-o", "--o", "--output", metavar="PATH", help="the database file to write")
    add_option(made, "txid", metavar="TXID", help="restore exactly this TXID (16 hex digits)")
    add_option(
        made,
        "timestamp",
        metavar="TIME",
        help="restore the newest state before this time: RFC 3339, or relative"
        ' ("-15m", "5 minutes ago")',
    )
    add_option(
        made, "label", metavar="NAME", help="restore the state that was marked with this name"
    )
    add_option(
        made,
        "parallelism",
        metavar="N",
        type=at_least_one,
        default=8,
        help="requests under way at once (8)",
    )
    add_option(
        made,
        "integrity-check",
        choices=["none", "quick", "full"],
        default="none",
        help="have SQLite check the database before it gets its name (none)",
    )
    add_option(
        made,
        "verify",
        choices=["auto", "full"],
        default="auto",
        help="full: also read and verify the outdated parts of large segments (auto)",
    )
    add_option(made, "force", action="store_true", help="replace an existing database")
    add_option(
        made,
        "if-db-not-exists",
        action="store_true",
        help="do nothing, successfully, if the output exists",
    )
    add_option(
        made,
        "if-replica-exists",
        action="store_true",
        help="do nothing, successfully, if there is no backup",
    )
    add_option(
        made,
        "delta",
        action="store_true",
        help="bring the output, made with -delta or -f before, up to date: fetch what changed",
    )
    made.add_argument("-f", "--f", action="store_true", help="follow the replica until stopped")
    add_option(
        made,
        "follow-interval",
        metavar="DURATION",
        default="1s",
        help="time between two looks with -f; each is one LIST request (1s)",
    )
    add_option(
        made, "dry-run", action="store_true", help="print what would be fetched, fetch nothing"
    )
    add_json(made)

    made = command(
        "verify",
        _late("replicas", "run_verify"),
        "restore a replica for trial, check it, and compare it with the database",
        epilog=_VERIFY_HELP,
    )
    add_target(made)
    add_config(made)
    add_option(
        made,
        "scratch",
        metavar="DIR",
        help="where there is room for the scratch file, which is as large as the database (beside"
        " the database; for a replica alone, the directory for temporary files)",
    )
    add_option(
        made,
        "parallelism",
        metavar="N",
        type=at_least_one,
        default=8,
        help="requests under way at once (8)",
    )
    add_json(made)

    for name in ("ltx", "wal"):
        summary = "list the segments of a replica"
        if name == "wal":
            summary += " (the old name of ltx)"
        made = command(name, _late("replicas", "run_ltx"), summary)
        add_target(made)
        add_config(made)
        add_option(
            made,
            "level",
            metavar="LEVEL",
            type=levels_of,
            default=levels_of("0"),
            help="0 fresh, 1 to 8 compacted, 9 snapshots, or all (0)",
        )
        add_json(made)

    made = command(
        "timeline",
        _late("replicas", "run_timeline"),
        "show which states can be restored, and the marks",
    )
    add_target(made)
    add_config(made)
    add_json(made)

    made = command(
        "unmark",
        _late("replicas", "run_unmark"),
        "remove a mark: retention need not keep its state any more",
    )
    add_target(made)
    made.add_argument("label", metavar="NAME", help="the mark")
    add_config(made)

    made = command(
        "replicate",
        _late("beside", "run_replicate"),
        "replicate databases whose applications do not use walship themselves",
        epilog=_REPLICATE_HELP,
    )
    made.add_argument("database", metavar="DB", nargs="?", help="a database file")
    made.add_argument("replica", metavar="REPLICA", nargs="?", help="its replica's URL")
    add_config(made)
    add_option(
        made, "exec", metavar="COMMAND", help="run this beside it, and end when it has ended"
    )
    add_option(made, "once", action="store_true", help="ship what is there, and end")
    add_option(made, "force-snapshot", action="store_true", help="with -once: then make a snapshot")
    add_option(
        made,
        "enforce-retention",
        action="store_true",
        help="with -once: then merge and remove what is due",
    )
    add_option(
        made,
        "restore-if-db-not-exists",
        action="store_true",
        help="first restore a database whose file is missing, if its replica has data",
    )
    add_option(made, "socket", metavar="PATH", help="make a control socket there")
    add_log_level(made)

    for name, does in _CONTROLS.items():
        made = command(name, _late("beside", "run_control"), does)
        made.add_argument("database", metavar="DB", help="a database file")
        if name == "register":
            add_option(made, "replica", metavar="URL", required=True, help="its replica's URL")
        if name == "unregister":
            what = "say what would be done, change nothing"
            add_option(made, "dry-run", action="store_true", help=what)
        if name == "sync":
            add_option(made, "wait", action="store_true", help="until the replica has it")
        add_config(made)
        add_socket(made)
        add_option(
            made,
            "timeout",
            metavar="SECONDS",
            type=at_least_one,
            default=30,
            help="how long to wait (30)",
        )
        add_json(made)

    made = command(
        "databases",
        _late("databases", "run_databases"),
        "list the databases of the configuration file",
    )
    add_config(made)
    add_json(made)

    made = command(
        "info",
        _late("databases", "run_info"),
        "show the processes that have databases of the file open",
    )
    add_running(made)

    made = command(
        "list",
        _late("databases", "run_list"),
        "list the databases of the file, and which are being replicated",
    )
    add_running(made)

    made = command(
        "status",
        _late("databases", "run_status"),
        "show local databases and how far their replicas are",
    )
    made.add_argument("database", metavar="DB", nargs="?", help="only this database")
    add_config(made)
    add_json(made)

    made = command(
        "reset",
        _late("databases", "run_reset"),
        "forget what is recorded beside a database: it becomes its replica's next state",
    )
    made.add_argument("database", metavar="DB", help="the database; no process may have it open")
    add_option(made, "dry-run", action="store_true", help="say what would be done, change nothing")
    add_config(made)

    made = command(
        "doctor",
        _late("replicas", "run_doctor"),
        "try out a store: is it fit for replicas?",
        epilog=_DOCTOR_HELP,
    )
    add_target(made)
    add_config(made)
    add_json(made)

    made = command("version", _version, "print the version")
    add_option(made, "verbose", action="store_true", help="also those of what it runs on")
    return parser


# --- commands ------------------------------------------------------------------------------------


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


if __name__ == "__main__":
    sys.exit(main())
