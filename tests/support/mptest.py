"""Several processes and threads at work on one database at once, in the manner of SQLite's mptest.

Every participant (a thread with connections of its own) goes through a script of tasks that its
seed chooses: transfers between accounts, with savepoints, roll-backs and spills, checkpoints of
every mode, VACUUM, schema changes, long reads, reopening, waits for the replica, and busy timeouts
from none to long.  How they interleave is up to the machine.  What must hold at every moment:

* the sum of all balances is what it was at the beginning;
* a participant's counter, its journal, and what it was told to be committed agree.

The parent side is `run`; the child side is this file run as a program.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[1]
#: No run takes longer than this, seconds.
_LIMIT_S = 120.0

_ACCOUNTS = 40
_BALANCE = 1000
TOTAL = _ACCOUNTS * _BALANCE


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        committed: by participant, how many of its transactions SQLite has acknowledged.
        done: by task, how often it came to its end; busy ones do not count.
        busy: how often a task gave up because the database was locked.
        killed: participants whose process was killed.
        breaks: what was logged about history that is not continuous: nobody outside walship writes
            here, so there is no reason for it.
    """

    committed: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    busy: int = 0
    killed: set[str] = field(default_factory=set)
    breaks: list[str] = field(default_factory=list)


def run(
    path: Path,
    replica: Path,
    *,
    seed: int,
    processes: int,
    threads: int,
    steps: int,
    kills: int = 0,
    settings: dict[str, Any] | None = None,
) -> Outcome:
    """Make the database and let everybody work on it; all have closed it when this returns.

    Args:
        seed: chooses every participant's script, and the moments of the kills.
        processes, threads: participants are threads of each process.
        steps: tasks of each participant.
        kills: processes that are killed; each is replaced by one that goes on.
        settings: keywords of ``walship.connect``.

    Raises:
        AssertionError: something did not hold; the message names the seed.
    """
    if not path.exists():
        prepare(path, replica, settings or {})
    rng = random.Random(seed)
    outcome = Outcome()
    ready = threading.Barrier(processes)
    failures: list[str] = []

    def supervise(n: int, kill_at: list[int]) -> None:
        life = 0
        ready.wait()
        while True:
            job = {
                "path": str(path),
                "replica": str(replica),
                "seed": f"{seed}/{n}/{life}",
                "who": [f"{n}.{thread}" for thread in range(threads)],
                "steps": steps,
                "settings": settings or {},
            }
            limit = kill_at[life] if life < len(kill_at) else None
            error = _listen(job, limit, outcome)
            if error is not None:
                failures.append(error)
            if error is not None or limit is None:
                return
            outcome.killed.update(job["who"])
            life += 1

    victims: dict[int, list[int]] = {n: [] for n in range(processes)}
    for _ in range(kills):
        victims[rng.randrange(processes)].append(rng.randrange(5, max(6, steps * threads // 4)))
    supervisors = [
        threading.Thread(target=supervise, args=(n, moments)) for n, moments in victims.items()
    ]
    for thread in supervisors:
        thread.start()
    for thread in supervisors:
        thread.join()
    assert not failures, f"seed {seed}:\n" + "\n".join(failures)
    return outcome


_merging = threading.Lock()


def _listen(job: dict[str, Any], kill_at: int | None, outcome: Outcome) -> str | None:
    """Run a child; None if it came to its end, or was killed as wanted."""
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), json.dumps(job)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(_TESTS)},
        text=True,
    )
    timer = threading.Timer(_LIMIT_S, child.send_signal, (signal.SIGABRT,))  # tells where it hangs
    timer.start()
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(child.stderr.read()))  # type: ignore[union-attr]
    reader.start()
    commits = 0
    ended = False
    try:
        assert child.stdout is not None
        for line in child.stdout:
            message = json.loads(line)
            with _merging:
                if "committed" in message:
                    outcome.committed[message["who"]] = message["committed"]
                    commits += 1
                elif "break" in message:
                    outcome.breaks.append(message["break"])
                else:
                    ended = True
                    outcome.busy += message["busy"]
                    for task, count in message["done"].items():
                        outcome.done[task] = outcome.done.get(task, 0) + count
            if kill_at is not None and commits == kill_at:
                child.kill()
    finally:
        status = child.wait()
        timer.cancel()
        reader.join()
        child.stdout.close()  # type: ignore[union-attr]
        child.stderr.close()  # type: ignore[union-attr]
    if status == -signal.SIGKILL and kill_at is not None:
        return None
    if status == 0 and ended:
        return None if kill_at is None else "a process came to its end before it was to be killed"
    return f"{job['who']} ended with {status}\n{''.join(errors)}"


def prepare(path: Path, replica: Path, settings: dict[str, Any]) -> None:
    """Make the tables."""
    import walship

    connection = walship.connect(path, {"path": str(replica), "sync_interval": 0.0}, **settings)
    connection.execute(
        """
        CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL, pad BLOB);
        CREATE INDEX by_balance ON accounts (balance);
        CREATE TABLE counters (who PRIMARY KEY, n) WITHOUT ROWID;
        CREATE TABLE journal (who, n, note, PRIMARY KEY (who, n));
        """
    )
    with connection:
        rows = ((n, _BALANCE) for n in range(_ACCOUNTS))
        connection.executemany("INSERT INTO accounts VALUES (?, ?, NULL)", rows)
    connection.close(True)


def check(connection: Any) -> dict[str, int]:
    """Look at everything in one read transaction.

    Args:
        connection: of apsw or of the standard module.

    Returns:
        Every participant's counter.

    Raises:
        AssertionError: something does not hold.
    """
    connection.execute("BEGIN")
    try:
        ((total,),) = connection.execute("SELECT sum(balance) FROM accounts").fetchall()
        assert total == TOTAL, f"the balances are {total} together, not {TOTAL}"
        # Once through the index, once without it.
        by_index = connection.execute("SELECT balance FROM accounts ORDER BY balance").fetchall()
        by_table = connection.execute("SELECT +balance FROM accounts NOT INDEXED").fetchall()
        assert by_index == sorted(by_table), "the index and the table differ"
        counters = dict(connection.execute("SELECT who, n FROM counters").fetchall())
        journals = connection.execute(
            "SELECT who, count(*), min(n), max(n) FROM journal GROUP BY who"
        ).fetchall()
        found = {who: n for who, n, _, _ in journals}
        assert found == counters, f"journals {found} and counters {counters} differ"
        assert all((low, high) == (1, n) for _, n, low, high in journals), journals
        return counters
    finally:
        connection.execute("ROLLBACK")


# -- the child ------------------------------------------------------------------------------------

Task = Callable[["Participant"], None]
TASKS: dict[str, tuple[Task, int]] = {}


def _task(weight: int) -> Callable[[Task], Task]:
    def note(task: Task) -> Task:
        TASKS[task.__name__] = (task, weight)
        return task

    return note


class Participant:
    """One thread with a script, a connection to write and one to read.

    Args:
        who: its name in counters and journal.
        say: tells the parent something.
    """

    def __init__(self, job: dict[str, Any], who: str, say: Callable[[dict[str, Any]], None]):
        self.job = job
        self.who = who
        self.say = say
        self.rng = random.Random(f"{job['seed']}/{who}")
        self.done: dict[str, int] = {}
        self.busy = 0
        self.n = 0
        self.writer = self.connect()
        self.reader = self.connect()
        self.has_view = False
        self.view: dict[str, int] = {}

    def connect(self) -> Any:
        import walship

        replica = {"path": self.job["replica"], "sync_interval": self.rng.choice((0.0, 0.05))}
        connection = walship.connect(
            self.job["path"], replica, busy_timeout=30, **self.job["settings"]
        )
        connection.wal_autocheckpoint(self.rng.choice((0, 5, 40, 1000)))
        return connection

    def run(self) -> None:
        import apsw

        # Its predecessor may have been killed after a commit that nobody heard of.
        self.n = self.own_counter()
        tasks = list(TASKS)
        weights = [TASKS[name][1] for name in tasks]
        for _ in range(self.job["steps"]):
            name = self.rng.choices(tasks, weights)[0]
            try:
                TASKS[name][0](self)
                self.done[name] = self.done.get(name, 0) + 1
            except (apsw.BusyError, apsw.LockedError):
                self.busy += 1
                if self.writer.in_transaction:
                    self.writer.execute("ROLLBACK")
            except Exception as error:
                error.add_note(f"in task {name} of {self.who}, seed {self.job['seed']}")
                raise
            assert self.own_counter() == self.n, f"{self.who} after {name}"
        self.drop_view()
        counters = check(self.reader)
        assert counters.get(self.who, 0) == self.n
        self.reader.close(True)
        self.writer.close(True)

    def own_counter(self) -> int:
        own = "SELECT n FROM counters WHERE who = ?"
        return self.writer.execute(own, (self.who,)).get or 0

    def drop_view(self) -> None:
        if self.has_view:
            self.reader.execute("ROLLBACK")
            self.has_view = False

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Any]:
        """A transaction with one transfer in it, counted and reported when it is committed."""
        db = self.writer
        db.set_busy_timeout(self.rng.choice((0, 1, 50, 30_000)))
        try:
            db.execute(self.rng.choice(("BEGIN", "BEGIN IMMEDIATE")))
            a, b = self.rng.sample(range(_ACCOUNTS), 2)
            amount = self.rng.randrange(1, 100)
            db.execute("UPDATE accounts SET balance = balance - ? WHERE id = ?", (amount, a))
            yield db
            db.execute("UPDATE accounts SET balance = balance + ? WHERE id = ?", (amount, b))
            db.execute("INSERT OR IGNORE INTO counters VALUES (?, 0)", (self.who,))
            db.execute("UPDATE counters SET n = n + 1 WHERE who = ?", (self.who,))
            values = (self.who, self.n + 1, self.rng.randbytes(self.rng.randrange(60)))
            db.execute("INSERT INTO journal VALUES (?, ?, ?)", values)
            db.execute("COMMIT")
        finally:
            db.set_busy_timeout(30_000)
        self.n += 1
        self.say({"who": self.who, "committed": self.n})


@_task(30)
def transfer(me: Participant) -> None:
    with me.transaction():
        pass


@_task(8)
def pad_accounts(me: Participant) -> None:
    """Overflow pages come."""
    with me.transaction() as db:
        size = me.rng.randrange(6000)
        first = me.rng.randrange(_ACCOUNTS)
        db.execute("UPDATE accounts SET pad = randomblob(?) WHERE id >= ?", (size, first))


@_task(5)
def strip_accounts(me: Participant) -> None:
    """Overflow pages go."""
    with me.transaction() as db:
        db.execute("UPDATE accounts SET pad = NULL")


@_task(6)
def spill(me: Participant) -> None:
    """A transaction larger than the cache writes frames before it is committed."""
    me.writer.execute("PRAGMA cache_size = 4")
    try:
        with me.transaction() as db:
            db.execute("UPDATE accounts SET pad = randomblob(3000)")
            db.execute("UPDATE accounts SET balance = balance + 1")
            db.execute("UPDATE accounts SET balance = balance - 1")
    finally:
        with contextlib.suppress(Exception):
            me.writer.execute("PRAGMA cache_size = -2000")


@_task(8)
def savepoints(me: Participant) -> None:
    """Part of a transaction is taken back, part of it kept."""
    with me.transaction() as db:
        for depth in range(me.rng.randrange(1, 4)):
            db.execute(f"SAVEPOINT s{depth}")
            db.execute("UPDATE accounts SET balance = balance * 2, pad = randomblob(900)")
            db.execute("INSERT INTO journal VALUES (?, ?, 'never')", (me.who, -depth))
            db.execute(f"ROLLBACK TO s{depth}")
            db.execute("UPDATE accounts SET pad = randomblob(100) WHERE id = ?", (depth,))
            if me.rng.random() < 0.5:
                db.execute(f"RELEASE s{depth}")


@_task(8)
def roll_back(me: Participant) -> None:
    """All of it is taken back; spilled, too."""
    db = me.writer
    if me.rng.random() < 0.5:
        db.execute("PRAGMA cache_size = 4")
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE accounts SET balance = 0, pad = randomblob(2000)")
    db.execute("DELETE FROM journal")
    db.execute("ROLLBACK")
    db.execute("PRAGMA cache_size = -2000")


@_task(14)
def checkpoint(me: Participant) -> None:
    mode = me.rng.choice(("NOOP", "PASSIVE", "FULL", "RESTART", "TRUNCATE"))
    me.writer.set_busy_timeout(me.rng.choice((0, 5, 100)))
    try:
        me.writer.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
    finally:
        me.writer.set_busy_timeout(30_000)


@_task(1)
def vacuum(me: Participant) -> None:
    me.drop_view()
    me.writer.set_busy_timeout(200)
    try:
        me.writer.execute("VACUUM")
    finally:
        me.writer.set_busy_timeout(30_000)


@_task(2)
def change_schema(me: Participant) -> None:
    me.writer.execute("BEGIN IMMEDIATE")
    me.writer.execute("CREATE INDEX IF NOT EXISTS extra ON accounts (id, balance)")
    me.writer.execute("COMMIT")
    if me.rng.random() < 0.7:
        me.writer.execute("DROP INDEX IF EXISTS extra")


@_task(2)
def set_user_version(me: Participant) -> None:
    me.writer.pragma("user_version", me.rng.randrange(1 << 30))


@_task(8)
def look(me: Participant) -> None:
    """All that must hold, in one view."""
    me.drop_view()
    counters = check(me.reader)
    assert counters.get(me.who, 0) == me.n


@_task(5)
def hold_a_view(me: Participant) -> None:
    """A read mark for many tasks: what it shows does not change, and checkpoints go round it."""
    query = "SELECT who, n FROM counters"
    if me.has_view:
        assert dict(me.reader.execute(query).fetchall()) == me.view
        me.drop_view()
        return
    me.reader.execute("BEGIN")
    me.view = dict(me.reader.execute(query).fetchall())
    me.has_view = True


@_task(3)
def reopen(me: Participant) -> None:
    me.drop_view()
    me.reader.close(True)
    me.writer.close(True)
    me.writer, me.reader = me.connect(), me.connect()


@_task(2)
def check_integrity(me: Participant) -> None:
    found = me.writer.execute("PRAGMA integrity_check").get
    assert found == "ok", found


@_task(3)
def wait_for_replica(me: Participant) -> None:
    import walship

    walship.replication(me.writer).sync(60)


class _Breaks(logging.Handler):
    """Tells what is logged about history that is not continuous."""

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say({"break": record.getMessage()})


def _main(job: dict[str, Any]) -> None:
    import faulthandler
    import traceback

    faulthandler.enable()
    speaking = threading.Lock()
    failures: list[str] = []
    participants: list[Participant] = []

    def say(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with speaking:
            while data:
                data = data[os.write(1, data) :]

    logging.getLogger("walship.capture").addHandler(_Breaks(say))

    def take_part(who: str) -> None:
        try:
            participant = Participant(job, who, say)
            participants.append(participant)
            participant.run()
        except BaseException:
            failures.append(traceback.format_exc())
            print(failures[-1], file=sys.stderr, flush=True)
            time.sleep(0.1)
            os._exit(1)  # the connections of the others would be waited for

    threads = [threading.Thread(target=take_part, args=(who,)) for who in job["who"]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done: dict[str, int] = {}
    for participant in participants:
        for task, count in participant.done.items():
            done[task] = done.get(task, 0) + count
    say({"done": done, "busy": sum(participant.busy for participant in participants)})


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
