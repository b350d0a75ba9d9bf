"""Processes with a database of their own accord: told what to do, line by line, and killed.

The parent side is `Worker`; the child side is this file run as a program.  The child executes the
pieces of Python it is sent, with `db`, `walship`, `apsw` and the helpers of `_Child` as names, and
answers with the value of the last expression.  Rows that it writes are named ``(who, n)``; those
whose commit has returned are reported at once, so that whoever kills it knows what must be found.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[1]
#: No answer takes longer than this, seconds; nothing is measured with it.
LIMIT_S = 60.0

Row = tuple[str, int]


class WorkerError(Exception):
    """What was asked of a worker raised there.

    Attributes:
        kind: name of the exception's class.
        text: its message.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text


class WorkerDied(Exception):
    """The process ended before it answered."""


class Worker:
    """One process, seen from its parent.

    Args:
        path: the database that its `open` opens.
        replica: mapping or directory for ``replica=``.
        who: names it in the rows it writes; of a new one.
        host: makes it believe to be on another machine: nobody sees whether it lives.
        settings: keywords of its ``connect``.

    Attributes:
        pid: of the process.
        committed: rows whose commit has returned, in order.
    """

    _serial = 0

    def __init__(
        self,
        path: Path,
        replica: Mapping[str, object] | Path | str,
        *,
        who: str = "",
        host: str | None = None,
        environ: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        Worker._serial += 1
        self.who = who or f"w{Worker._serial}"
        self.path = path
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        place = {"path": str(replica)} if isinstance(replica, (str, Path)) else dict(replica)
        job = {
            "path": str(path),
            "replica": {"sync_interval": 0.0, **place},
            "who": self.who,
            "host": host,
            "settings": settings,
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": str(_TESTS), **(environ or {})},
        )
        self.pid = self._process.pid
        self.committed: list[Row] = []
        self._changed = threading.Condition()
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "row" in message:
                with self._changed:
                    self.committed.append((self.who, message["row"]))
                    self._changed.notify_all()
            else:
                self._answers.put(message)
        with self._changed:
            self._changed.notify_all()
        self._answers.put(None)

    # -- asking -------------------------------------------------------------------------------

    def begin(self, source: str) -> None:
        """Have something done; `end` gives the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(source).encode() + b"\n")
        self._process.stdin.flush()

    def end(self, limit_s: float = LIMIT_S) -> Any:
        """The answer to the oldest `begin` that has none yet.

        Raises:
            WorkerError: it raised.
            WorkerDied: it will never answer.
        """
        try:
            message = self._answers.get(timeout=limit_s)
        except queue.Empty:
            os.kill(self.pid, signal.SIGUSR1)  # it writes down where its threads are
            time.sleep(0.5)
            raise AssertionError(f"{self.who} does not answer\n{self.log()}") from None
        if message is None:
            self._answers.put(None)
            raise WorkerDied(f"{self.who} ended with {self._process.wait()}\n{self.log()}")
        if "error" in message:
            raise WorkerError(message["error"], message["text"])
        return message["value"]

    def run(self, source: str, limit_s: float = LIMIT_S) -> Any:
        """Have something done and wait for the value of its last expression."""
        self.begin(source)
        return self.end(limit_s)

    def has_answered(self, within_s: float = 0.0) -> bool:
        """Whether an answer is there; waits so long for it at most."""
        deadline = time.monotonic() + within_s
        while self._answers.empty():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        return True

    def wait_committed(self, count: int) -> None:
        """Wait until so many rows were committed."""
        with self._changed:
            ready = self._changed.wait_for(
                lambda: len(self.committed) >= count or not self._thread.is_alive(), LIMIT_S
            )
        if not ready or len(self.committed) < count:
            raise AssertionError(f"{self.who}: {len(self.committed)} commits\n{self.log()}")

    def log(self) -> str:
        """What it has written to standard error: its log, at level INFO."""
        with open(f"/proc/self/fd/{self._log.fileno()}", "rb") as file:
            return file.read().decode()

    # -- its life -----------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL; returns when it is gone and everything it said was heard."""
        self._process.kill()
        self.wait()

    def pause(self) -> None:
        """SIGSTOP; returns when it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM, which the child takes as an orderly end."""
        self._process.terminate()

    def finish(self) -> int:
        """Let it come to the end of its program; its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.wait()

    def wait(self) -> int:
        """Wait for its end; its exit status."""
        status = self._process.wait(LIMIT_S)
        self._thread.join(LIMIT_S)
        return status

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def dispose(self) -> None:
        """Kill it if it lives, and forget it."""
        if self.alive:
            self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._log.close()


class Workers:
    """Makes workers, and ends those that are left."""

    def __init__(self) -> None:
        self.all: list[Worker] = []

    def __call__(self, *args: Any, opened: bool = True, **keywords: Any) -> Worker:
        """A new worker, with its connection open unless ``opened`` is false."""
        worker = Worker(*args, **keywords)
        self.all.append(worker)
        if opened:
            worker.run("open()")
        return worker

    def many(self, count: int, *args: Any, **keywords: Any) -> list[Worker]:
        """Several that open at the same time."""
        made = [self(*args, opened=False, **keywords) for _ in range(count)]
        for worker in made:
            worker.begin("open()")
        for worker in made:
            worker.end()
        return made

    def committed(self) -> set[Row]:
        """Every row that was committed by any of them."""
        return {row for worker in self.all for row in worker.committed}


@contextlib.contextmanager
def workers() -> Iterator[Workers]:
    """Workers that do not outlive the block."""
    made = Workers()
    try:
        yield made
    finally:
        for worker in made.all:
            worker.dispose()


def rows_of(path: Path) -> set[Row]:
    """The rows that workers have written to a database file, through a connection that harms
    nothing."""
    import apsw

    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE, vfs="unix")
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.set_busy_timeout(5000)
        return set(connection.execute("SELECT who, n FROM rows"))
    finally:
        connection.close(True)


# -- the child ------------------------------------------------------------------------------------


class _Child:
    """What the pieces of Python may call."""

    def __init__(self, job: dict[str, Any]) -> None:
        import apsw

        import walship

        self.job = job
        self.n = 0
        self._stop = threading.Event()
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self.names: dict[str, Any] = {
            "apsw": apsw,
            "walship": walship,
            "os": os,
            "time": time,
            "threading": threading,
            "job": job,
            "db": None,
            "open": self.open,
            "close": self.close,
            "insert": self.insert,
            "write": self.write,
            "stop": self.stop,
            "sync": self.sync,
            "status": self.status,
            "engine": self.engine,
            "hold_puts": self.hold_puts,
            "release_puts": self.release_puts,
        }

    def open(self, **settings: Any) -> None:
        """Open the database, and make its table."""
        import walship

        given = {"busy_timeout": 30, **self.job["settings"], **settings}
        replica = given.pop("replica", self.job["replica"])
        db = walship.connect(self.job["path"], replica, **given)
        self.names["db"] = db
        if db.readonly("main"):
            return
        db.execute("BEGIN IMMEDIATE")
        try:
            db.execute("CREATE TABLE IF NOT EXISTS rows (who, n, pad, PRIMARY KEY (who, n))")
            self.n = self.newest(db)
        finally:
            db.execute("COMMIT")

    def newest(self, db: Any) -> int:
        """The highest number among its rows."""
        own = "SELECT coalesce(max(n), 0) FROM rows WHERE who = ?"
        found: int = db.execute(own, (self.job["who"],)).fetchall()[0][0]
        return found

    def close(self) -> None:
        self.names["db"].close(True)

    def insert(self, count: int = 1, size: int = 20, db: Any = None) -> int:
        """Commit so many rows, one by one; each is reported when its commit has returned."""
        import walship

        db = db or self.names["db"]
        for _ in range(count):
            n = self.n + 1
            try:
                values = (self.job["who"], n, os.urandom(size))
                db.execute("INSERT INTO rows VALUES (?, ?, ?)", values)
            except walship.ReplicaError:
                self.n = self.newest(db)  # it may be there all the same
                raise
            self.n = n
            self.say({"row": n})
        return self.n

    def write(self, pause: float = 0.0, size: int = 20, **settings: Any) -> None:
        """Commit rows without end, in a thread with a connection of its own."""
        import walship

        given = {"busy_timeout": 30, **self.job["settings"], **settings}
        db = walship.connect(self.job["path"], self.job["replica"], **given)
        self._stop.clear()
        self._failure = None

        def loop() -> None:
            try:
                while not self._stop.wait(pause):
                    self.insert(1, size, db)
            except BaseException as error:
                self._failure = error
            finally:
                db.close(True)

        self._writer = threading.Thread(target=loop)
        self._writer.start()

    def stop(self) -> int:
        """End `write`; raises what ended it before."""
        assert self._writer is not None
        self._stop.set()
        self._writer.join()
        if self._failure is not None:
            raise self._failure
        return self.n

    def sync(self, timeout: float | None = 50.0) -> int:
        import walship

        return walship.replication(self.job["path"]).sync(timeout)

    def status(self) -> dict[str, Any]:
        import dataclasses

        import walship

        return dataclasses.asdict(walship.replication(self.job["path"]).status())

    def engine(self) -> Any:
        import walship

        return walship.replication(self.job["path"]).engine

    def hold_puts(self) -> None:
        """From now on no object gets into a directory replica, until `release_puts`."""
        from walship.replica.store.local import LocalStore

        gate = self._gate = threading.Event()
        put = self._put = LocalStore.put

        def held(*args: Any, **keywords: Any) -> Any:
            gate.wait()
            return put(*args, **keywords)

        LocalStore.put = held  # type: ignore[method-assign]

    def release_puts(self) -> None:
        from walship.replica.store.local import LocalStore

        LocalStore.put = self._put  # type: ignore[method-assign]
        self._gate.set()

    def say(self, message: dict[str, Any]) -> None:
        data = json.dumps(message, default=repr).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(1, data) :]

    def run(self) -> None:
        for line in sys.stdin.buffer:
            _ending.busy = True
            try:
                value = self.evaluate(json.loads(line))
            except Exception as error:
                self.say({"error": type(error).__name__, "text": str(error)})
            else:
                self.say({"value": value})
            _ending.busy = False
            if _ending.asked:
                sys.exit(0)

    def evaluate(self, source: str) -> Any:
        tree = ast.parse(source)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<asked>", "exec"), self.names)
        if last is None:
            return None
        assert isinstance(last, ast.Expr)
        value = eval(compile(ast.Expression(last.value), "<asked>", "eval"), self.names)
        return list(value) if isinstance(value, (set, tuple)) else value


class _Ending:
    """SIGTERM as a well-behaved program takes it: what is under way comes to its end first."""

    def __init__(self) -> None:
        self.busy = False
        self.asked = False

    def __call__(self, *_: object) -> None:
        self.asked = True
        if not self.busy:
            sys.exit(0)


_ending = _Ending()


def _main(job: dict[str, Any]) -> None:
    import faulthandler
    import logging

    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s"
    )
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGTERM, _ending)
    if job["host"] is not None:
        from walship.replica import process

        process._surroundings = lambda: str(job["host"])
    _Child(job).run()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
