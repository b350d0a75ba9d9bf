"""A machine dies, and its database comes back.

Starts an application in a process of its own that takes orders into SQLite through walship, kills
it with SIGKILL in the middle of its work, deletes its directory (database, WAL and spool), restores
the database from the replica, and counts.  Exits with 1 if anything is missing that was in the
replica.

The replica is a directory below ``./demo-data``.  With the usual variables set it is a bucket:
``BUCKET_NAME``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL_S3`` and
``AWS_REGION`` (what ``fly storage create`` sets), or ``WALSHIP_REPLICA`` with a URL.  Every run
writes below a path of its own there, and touches nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import walship

ITEMS = ("teapot", "kettle", "cup", "saucer", "strainer", "tea")


# --- the application -----------------------------------------------------------------------------
#
# An ordinary program with an SQLite database.  Only the line with `walship.connect` is special.


def order(number: int) -> tuple[int, str, int]:
    """The order with this number: always the same, so that a restored one can be checked."""
    chance = zlib.crc32(number.to_bytes(8, "big"))
    return number, ITEMS[chance % len(ITEMS)], chance % 9_000 + 100


def run_application(database: str, replica: str, pause_s: float) -> None:
    """Take orders until killed; says ``order N`` on standard output after each commit."""
    db = walship.connect(database, replica=replica)
    db.execute("create table orders (number integer primary key, item text, cents integer)")
    db.execute("create table books (orders integer, cents integer)")
    db.execute("insert into books values (0, 0)")
    taken = 0

    def tell_what_is_safe() -> None:
        # The application itself needs no such thread: it is here so that the demo can know, from
        # the outside, what had reached the replica when the machine died.
        while True:
            number = taken
            txid = walship.replication(database).sync()
            say(f"safe {number} {txid}")
            time.sleep(0.4)

    threading.Thread(target=tell_what_is_safe, daemon=True).start()
    while True:
        number, item, cents = order(taken + 1)
        with db:  # one transaction: the order, and the books that count it
            db.execute("insert into orders values (?, ?, ?)", (number, item, cents))
            db.execute("update books set orders = orders + 1, cents = cents + ?", (cents,))
        taken = number
        say(f"order {number}")
        time.sleep(pause_s)


def say(line: str) -> None:
    """One line to whoever listens, at once and in one piece."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


# --- watching it ---------------------------------------------------------------------------------


class Watched:
    """The application as seen from outside: what it told before it died."""

    def __init__(self, database: Path, replica: str, pause_s: float) -> None:
        self.taken: dict[int, float] = {}  # number of an order: when it was acknowledged
        self.safe = 0  # orders known to be in the replica
        self.safe_txid = 0
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--application", database, replica, str(pause_s)],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            word, _, rest = line.rstrip("\n").partition(" ")
            if word == "order":
                self.taken[int(rest)] = time.monotonic()
            elif word == "safe":
                self.safe, self.safe_txid = map(int, rest.split())

    def kill(self) -> float:
        """SIGKILL: no handler runs, nothing is flushed.  Returns when that was."""
        self.process.send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        self.process.wait()
        self._listener.join()  # what it said before it died still counts
        return killed_at


# --- the story -----------------------------------------------------------------------------------


class Story:
    """Prints the demo; in colour and with a moving line on a terminal."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = self.live and "NO_COLOR" not in os.environ
        self._chapter = 0

    def paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour else text

    def chapter(self, title: str) -> None:
        self._chapter += 1
        print(f"\n{self.paint(f' {self._chapter} ', '7')} {self.paint(title, '1')}\n", flush=True)

    def line(self, text: str = "") -> None:
        print(f"    {text}" if text else "", flush=True)

    def moving(self, text: str) -> None:
        """Replaces the line before it, on a terminal."""
        if self.live:
            print(f"\r\033[K    {text}", end="", flush=True)

    def settle(self, text: str) -> None:
        """The last state of a moving line."""
        print(f"\r\033[K    {text}" if self.live else f"    {text}", flush=True)

    def fact(self, name: str, value: str, note: str = "", code: str = "0") -> None:
        value = self.paint(f"{value:>10}", code)
        self.line(f"{name:<34}{value}{self.paint(f'   {note}', '2') if note else ''}")


def main() -> int:
    if sys.argv[1:2] == ["--application"]:
        try:
            run_application(sys.argv[2], sys.argv[3], float(sys.argv[4]))
        except walship.ReplicaError as error:
            print(f"\napplication: {error}", file=sys.stderr)
        except (KeyboardInterrupt, BrokenPipeError):
            pass
        return 1
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="until the machine dies (5)")
    parser.add_argument("--rate", type=float, default=400.0, help="orders a second, at most (400)")
    parser.add_argument(
        "--directory", type=Path, default=Path("demo-data"), help="where it happens (./demo-data)"
    )
    arguments = parser.parse_args()
    try:
        with prepared(arguments.directory) as directory:
            return play(directory, arguments.seconds, 1 / arguments.rate)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (OSError, walship.ReplicaError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def prepared(directory: Path) -> Iterator[Path]:
    """An empty directory; one that is not the demo's own is left alone."""
    marker = directory / ".walship-demo"
    if directory.exists() and not marker.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} holds something else: name another --directory")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    marker.touch()
    yield directory


def find_replica(directory: Path) -> tuple[str, str]:
    """Where to replicate to, and a word about it."""
    run = time.strftime("walship-demo/%Y%m%d-%H%M%S")
    if url := os.environ.get("WALSHIP_REPLICA"):
        url = os.path.expandvars(url)
    elif bucket := os.environ.get("BUCKET_NAME"):
        url = f"s3://{bucket}"
    else:
        return str(directory / "replica"), "a directory; a bucket if BUCKET_NAME is set"
    if "://" not in url:
        return str(Path(url, run)), "a directory, from WALSHIP_REPLICA"
    parts = urlsplit(url)
    path = f"{parts.path.rstrip('/')}/{run}"
    return urlunsplit(parts._replace(path=path)), parts.scheme.upper()


def play(directory: Path, seconds: float, pause_s: float) -> int:
    story = Story()
    machine = directory / "machine"
    machine.mkdir()
    database = machine / "orders.db"
    replica, kind = find_replica(directory)

    story.chapter("An application takes orders")
    story.line(f"its database   {database}   (SQLite, opened with walship.connect)")
    story.line(f"its replica    {replica}   ({kind})")
    story.line()
    application = Watched(database, replica, pause_s)
    try:
        if not watch(story, application, seconds):
            print("\ndemo: the application did not get going", file=sys.stderr)
            return 1
        story.chapter("Its machine dies")
        killed_at = application.kill()
    finally:
        application.process.kill()
        application.process.wait()
    story.line(f"SIGKILL to process {application.process.pid}, in the middle of its work.")
    lost = sorted(path.name for path in machine.iterdir())
    shutil.rmtree(machine)
    story.line(f"Its disk is gone: {', '.join(lost)}.")

    story.chapter("A new machine restores the database")
    restored = directory / "new-machine" / "orders.db"
    story.line(f'walship.restore("{replica}",')
    story.line(f'                "{restored}")')
    started = time.monotonic()
    walship.restore(replica, restored)
    took = time.monotonic() - started
    story.line()
    story.line(f"{restored.stat().st_size:,} bytes in {took:.2f} s")

    story.chapter("What came back")
    code = report(story, application, restored, killed_at)
    walship_command = Path(sys.executable).parent / "walship"
    story.line(story.paint(f"Look around:  {relative(walship_command)} ltx '{replica}'", "2"))
    print()
    return code


def relative(path: Path) -> str:
    """Shorter to type, where the path is below the present directory."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def watch(story: Story, application: Watched, seconds: float) -> bool:
    """Show the application at work; False if it ended by itself."""
    deadline: float | None = None
    patience = time.monotonic() + 60
    while application.process.poll() is None:
        now = time.monotonic()
        if deadline is None and application.taken:
            deadline = now + seconds
        taken, safe = len(application.taken), application.safe
        text = f"{taken:>7,} orders committed   {safe:>7,} of them known to be in the replica"
        if now > (deadline or patience):
            story.settle(text)
            return bool(application.taken)
        story.moving(text)
        time.sleep(0.1)
    return False


def report(story: Story, application: Watched, restored: Path, killed_at: float) -> int:
    """Count what came back, with plain sqlite3; the exit code."""
    with contextlib.closing(sqlite3.connect(restored)) as db:
        check = "; ".join(row[0] for row in db.execute("pragma integrity_check"))
        rows = db.execute("select number, item, cents from orders order by number").fetchall()
        books = db.execute("select orders, cents from books").fetchone()
    right = rows == [order(number) for number in range(1, len(rows) + 1)]
    right = right and books == (len(rows), sum(row[2] for row in rows))
    taken, safe, found = len(application.taken), application.safe, len(rows)
    missing = max(0, safe - found)
    story.fact("SQLite's integrity check", check, code="32" if check == "ok" else "31")
    story.fact(
        "every order and the books", "right" if right else "WRONG", code="32" if right else "31"
    )
    story.line()
    story.fact("commits acknowledged", f"{taken:,}")
    story.fact("in the replica at the kill", f"{safe:,}", "at least: so many were confirmed")
    story.fact("restored", f"{found:,}")
    story.fact("missing", f"{missing:,}", code="1;31" if missing else "1;32")
    story.line()
    behind = taken - found
    if behind > 0:
        age = killed_at - application.taken[found + 1]
        story.line(
            f"{behind:,} commits of the last {age:.1f} s were on their way and went with the disk:"
        )
        story.line("commits return at once, and are shipped right behind.")
    else:
        story.line("Nothing that was acknowledged was lost.")
    story.line()
    return 0 if check == "ok" and right and not missing and found else 1


if __name__ == "__main__":
    sys.exit(main())
