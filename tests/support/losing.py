"""Machines that are lost: SIGKILL while commits wait for the replica, and the disk is gone with it.

    python losing.py [--kills N] [--store seaweedfs|minio|directory] [--seed N] [--at-once N]

A game is one database in one replica.  Its machine is a directory; the application on it is forked
from a server that has imported everything, because a kill should cost no more than it must.  Some
threads commit numbered rows and write down each that was acknowledged as durable, outside of the
machine.  After a random time the process is killed and the directory deleted; what the replica
gives back must hold every row that was written down, nothing that was not committed, and no gap.
Then the game goes on: the next machine restores what the last one left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parent
if str(SUPPORT.parent) not in sys.path:
    sys.path.insert(0, str(SUPPORT.parent))

import apsw  # noqa: E402

import walship  # noqa: E402

#: Lives of one game at most, before the next begins with an empty replica.
_LIVES = 6
#: How a writer gets to know that its commit is durable; "async" never does, and counts for order.
_WAYS = ("connection", "transaction", "sync", "async")
#: No application may run, and no commit may wait, longer than this, seconds.
_LIMIT_S = 60.0

Replica = Mapping[str, object]


@dataclass
class Tally:
    """What came of some kills.

    Attributes:
        kills: processes that were killed.
        acknowledged: commits of theirs that were acknowledged as durable.
        missing: how many of those no restore gave back.
        faults: everything that was wrong, a line each.
    """

    kills: int = 0
    acknowledged: int = 0
    missing: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.kills += other.kills
        self.acknowledged += other.acknowledged
        self.missing += other.missing
        self.faults += other.faults


class ForkServer:
    """A process that has imported walship and forks one application at a time."""

    def __init__(self, directory: Path) -> None:
        self._errors = (directory / f"fork-server-{id(self)}.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SUPPORT.parent)},
        )

    def start(self, job: Mapping[str, Any]) -> int:
        """Fork an application; its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._number()

    def wait(self) -> int:
        """Wait for its end; the exit status, ``-signal.SIGKILL`` if it was killed."""
        return self._number()

    def _number(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the fork server has ended: {self.errors()}")
        return int(line)

    def errors(self) -> str:
        """The end of what the applications wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read()[-2000:]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Game:
    """Lives of one database, one machine after the other.

    Args:
        replica: settings of an empty replica.
        directory: for machines and restored databases.
    """

    def __init__(self, server: ForkServer, replica: Replica, directory: Path, seed: int) -> None:
        self._server = server
        self._replica = replica
        self._directory = directory
        self._seed = seed
        self._rng = random.Random(seed)
        n_writers = self._rng.choice((1, 3, 5, 8))
        first = self._rng.randrange(3)  # somebody always waits
        self._ways = [_WAYS[(first + n) % len(_WAYS)] for n in range(n_writers)]
        # By writer: the highest row acknowledged as durable, and the highest ever seen restored.
        self._acknowledged = [0] * n_writers
        self._restored = [0] * n_writers

    def live(self) -> Tally:
        """One life and its end."""
        tally = Tally()
        machine = self._directory / f"machine-{self._seed}"
        notes = self._directory / f"notes-{self._seed}"
        machine.mkdir()
        notes.touch()
        try:
            self._run_and_kill(machine, notes, tally)
            shutil.rmtree(machine)
            self._read(notes, tally)
            self._compare(tally)
        finally:
            shutil.rmtree(machine, ignore_errors=True)
            notes.unlink()
        return tally

    def _run_and_kill(self, machine: Path, notes: Path, tally: Tally) -> None:
        rng = self._rng
        pid = self._server.start(
            {
                "database": str(machine / "app.db"),
                "replica": {"sync-interval": rng.choice(("1ms", "50ms")), **self._replica},
                "notes": str(notes),
                "seed": self._seed,
                "ways": self._ways,
                "checkpoint_pages": rng.choice((5, 40, 1000)),
                "n_pad": rng.choice((10, 300, 6000)),
            }
        )
        try:
            if rng.random() < 0.85:  # else while it starts, restoring perhaps
                _wait_for_acknowledgement(notes, pid)
            time.sleep(rng.random() * 0.12)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status = self._server.wait()
        if status == -signal.SIGKILL:
            tally.kills += 1
        else:
            tally.faults.append(f"it ended with status {status}: {self._server.errors()}")

    def _read(self, notes: Path, tally: Tally) -> None:
        for line in notes.read_text().splitlines():
            writer, number = map(int, line.split())
            tally.acknowledged += 1
            self._acknowledged[writer] = max(self._acknowledged[writer], number)

    def _compare(self, tally: Tally) -> None:
        target = self._directory / f"restored-{self._seed}.db"
        try:
            walship.restore(self._replica, target, integrity_check="full")
        except walship.NoBackupError:
            found = [0] * len(self._ways)
        except walship.ReplicaError as error:
            tally.faults.append(f"it cannot be restored: {error}")
            found = [0] * len(self._ways)
        else:
            found = self._rows(target, tally)
            target.unlink()
        for writer, number in enumerate(found):
            expected = self._acknowledged[writer]
            if number < max(expected, self._restored[writer]):
                tally.missing += max(0, expected - number)
                tally.faults.append(
                    f"writer {writer} ({self._ways[writer]}): row {expected} was acknowledged, "
                    f"{self._restored[writer]} seen before, and {number} is the last one restored"
                )
            self._restored[writer] = max(self._restored[writer], number)

    def _rows(self, path: Path, tally: Tally) -> list[int]:
        """The highest row of each writer; all below it must be there, as they were written."""
        highest = [0] * len(self._ways)
        with contextlib.closing(apsw.Connection(str(path))) as connection:
            tables = connection.execute("select count(*) from sqlite_schema").get
            rows = connection.execute("select w, n, pad from t order by w, n") if tables else ()
            for writer, number, pad in rows:
                if number != highest[writer] + 1 or pad != _pad(
                    self._seed, writer, number, len(pad)
                ):
                    tally.faults.append(f"writer {writer}: row {number} is wrong")
                highest[writer] = number
        return highest


def lose_machines(
    replica_of: Callable[[int], Replica],
    directory: Path,
    kills: int,
    *,
    seed: int = 0,
    at_once: int = 1,
    told: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Play until so many processes were killed.

    Args:
        replica_of: settings of the replica of a game, by its number; each must be empty.
        directory: for machines; what is made there is removed.
        at_once: games under way at the same time.
        told: called after each kill with what came of all so far.
    """
    total = Tally()
    lock = threading.Lock()
    numbers = iter(range(seed, seed + 1_000_000))

    def play() -> None:
        with ForkServer(directory) as server:
            while True:
                with lock:
                    if total.kills >= kills or len(total.faults) > 20:
                        return
                    number = next(numbers)
                game = Game(server, replica_of(number), directory, number)
                for _ in range(1 + number % _LIVES):
                    tally = game.live()
                    with lock:
                        tally.faults = [f"game {number}: {fault}" for fault in tally.faults]
                        total.add(tally)
                        told(total)
                        if tally.faults or total.kills >= kills:
                            break

    with ThreadPoolExecutor(at_once) as pool:
        for done in [pool.submit(play) for _ in range(at_once)]:
            done.result()
    return total


def _wait_for_acknowledgement(notes: Path, pid: int) -> None:
    limit = time.monotonic() + _LIMIT_S
    while not notes.stat().st_size:
        if time.monotonic() > limit or not _is_running(pid):
            return  # whoever waits for its end learns the reason
        time.sleep(0.001)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _pad(seed: int, writer: int, number: int, n_bytes: int) -> bytes:
    return random.Random(f"{seed}/{writer}/{number}").randbytes(n_bytes)


# -- the application ------------------------------------------------------------------------------


def _serve() -> None:
    """Fork an application for each line of standard input; say its id, then its exit status."""
    import boto3.session  # noqa: F401  (what the application would import)

    import walship.replica.store.s3  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _application(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _application(job: dict[str, Any]) -> None:
    """Commit until killed; never returns."""
    try:
        writers = _Writers(job)
        threads = [
            threading.Thread(target=writers.run, args=(number,), daemon=True)
            for number in range(len(job["ways"]))
        ]
        for thread in threads:
            thread.start()
        writers.failed.wait(_LIMIT_S)
    except BaseException as error:
        print(f"application: {error!r}", file=sys.stderr, flush=True)
    os._exit(3)


class _Writers:
    """Threads that commit, each its own rows, and note what became durable."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._notes = os.open(job["notes"], os.O_WRONLY | os.O_APPEND)
        self.failed = threading.Event()
        self._connect("async").execute(
            "create table if not exists t(w integer, n integer, pad blob, primary key(w, n))"
        )

    def _connect(self, way: str) -> walship.Connection:
        return walship.connect(
            self._job["database"],
            self._job["replica"],
            busy_timeout=_LIMIT_S,
            durability="replica" if way == "connection" else "async",
            min_checkpoint_page_count=self._job["checkpoint_pages"],
        )

    def run(self, writer: int) -> None:
        try:
            self._run(writer, self._job["ways"][writer])
        except BaseException as error:
            print(f"writer {writer}: {error!r}", file=sys.stderr, flush=True)
            self.failed.set()

    def _run(self, writer: int, way: str) -> None:
        connection = self._connect(way)
        last = connection.execute("select coalesce(max(n), 0) from t where w = ?", (writer,)).get
        insert = "insert into t values (?, ?, ?)"
        for number in range(last + 1, sys.maxsize):
            row = (writer, number, _pad(self._job["seed"], writer, number, self._job["n_pad"]))
            if way == "transaction":
                with walship.durable(connection, timeout=_LIMIT_S):
                    connection.execute(insert, row)
            else:
                connection.execute(insert, row)
            if way == "sync":
                walship.replication(connection).sync(_LIMIT_S)
            elif way == "async":
                time.sleep(0.001)
                continue
            os.write(self._notes, b"%d %d\n" % (writer, number))


# -- by hand --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _replicas(store: str, directory: Path) -> Iterator[Callable[[int], Replica]]:
    from support.servers import SERVERS

    if store == "directory":
        yield lambda number: {"path": str(directory / f"replica-{number}")}
        return
    with SERVERS[store]() as endpoint:
        bucket = endpoint.make_bucket()
        yield lambda number: endpoint.replica(bucket, f"game-{number}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make soak", description="Loses machines and counts what is missing."
    )
    parser.add_argument("--kills", type=int, default=1000, help="processes to kill (1000)")
    parser.add_argument("--store", choices=("seaweedfs", "minio", "directory"), default="seaweedfs")
    parser.add_argument("--seed", type=int, default=0, help="number of the first game")
    parser.add_argument("--at-once", type=int, default=2, help="games at the same time (2)")
    options = parser.parse_args()
    started = time.monotonic()

    def told(tally: Tally) -> None:
        if tally.kills % 100 == 0:
            print(f"{tally.kills} kills, {tally.acknowledged} durable commits", flush=True)

    with (
        tempfile.TemporaryDirectory(prefix="walship-soak-") as name,
        _replicas(options.store, Path(name)) as replica_of,
    ):
        tally = lose_machines(
            replica_of,
            Path(name),
            options.kills,
            seed=options.seed,
            at_once=options.at_once,
            told=told,
        )
    for fault in tally.faults:
        print(fault, file=sys.stderr)
    print(
        f"{tally.kills} kills in {time.monotonic() - started:.0f} s: {tally.acknowledged} commits "
        f"acknowledged as durable, {tally.missing} missing, {len(tally.faults)} faults"
    )
    return 1 if tally.faults or tally.missing else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        _serve()
    else:
        sys.exit(main())
