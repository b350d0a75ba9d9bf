"""Verification in a process of its own, beside an application that has the database open.

Restoring, hashing and SQLite's check are minutes of work that would take the GIL, caches and memory
of the application.  In a child they take none, and the child is also where the database's files can
be opened: closing one in the application's process would drop SQLite's locks.

The child is told what to do through its standard input and answers on its standard output.  It ends
with its parent, however that ends, and is killed when the last connection closes, so that its read
mark does not keep SQLite from removing the WAL.  When it has let go of that it gives way to
everything else on the machine.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, cast

from .clock import SystemClock
from .errors import ReplicaError
from .store.opening import open_store
from .store.retrying import RetryingStore
from .store.settings import StoreSettings
from .verify import Verification, verify

__all__ = ["Job", "VerifyProcess", "main"]

#: Niceness of the child: the lowest priority there is.
_NICE: Final = 19
#: How long the child may take to clean up once its parent is gone, seconds.
_END_S: Final = 5.0
_PROGRAM: Final = "from walship.replica.verify_process import main; main()"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the child is to do.

    Attributes:
        store: the replica.
        url: the same for people.
        database: the live database.
        directory: its state directory, where the scratch file goes too.
    """

    store: StoreSettings
    url: str
    database: Path
    directory: Path


class VerifyProcess:
    """One verification.  `kill` may be called from any thread.

    Args:
        job: what to do.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        # Guards `_process` and `_killed`.
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    def run(self, timeout: float | None = None) -> Verification | None:
        """Verify, and wait for the outcome; what kept it from being done is an outcome as well.

        Args:
            timeout: seconds.

        Returns:
            None if it was killed.
        """
        with tempfile.TemporaryFile() as messages:
            try:
                process = self._begin(messages.fileno())
                if process is None:
                    return None
                said = _talk(process, pickle.dumps(self._job), timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                return self._failed(f"it was not done after {timeout:g} s")
            except OSError as error:
                self.kill()
                return self._failed(f"no process can be started for it: {error}")
            finally:
                self._end()
            if self._killed:
                return None
            try:
                answer = json.loads(said)
                if "error" in answer:
                    return self._failed(str(answer["error"]))
                for name in ("findings", "differing"):
                    answer[name] = tuple(answer[name])
                return Verification(**answer)
            except (ValueError, TypeError):
                return self._failed(f"its process ended with {process.returncode}{_last(messages)}")

    def _begin(self, messages: int) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if not self._killed:
                self._process = _start(messages)
            return self._process

    def kill(self) -> None:
        """End it at once; it holds no lock on the database any more when this returns."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                _kill(self._process)

    def forget(self) -> None:
        """In a forked child: it is the parent's, whose end must not go unnoticed because of us."""
        self._lock = threading.Lock()
        self._killed = True
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0  # nobody is to wait for it here
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            _kill(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _failed(self, problem: str) -> Verification:
        return Verification(
            outcome="failed",
            replica=self._job.url,
            problem=f"not verified: {problem}",
            time_ms=SystemClock().now_ms(),
        )


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel
        process.wait(_END_S)


def _start(messages: int) -> subprocess.Popen[bytes]:
    # Modules are found where this process finds them; Ctrl-C in a terminal is not for the child.
    program = f"import sys; sys.path[:] = {sys.path!r}; {_PROGRAM}"
    return subprocess.Popen(
        [_python(), "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=messages,
        bufsize=0,
        start_new_session=True,
    )


def _python() -> str:
    """The interpreter; in servers that embed Python, ``sys.executable`` is the server."""
    if "python" in os.path.basename(sys.executable or ""):
        return sys.executable
    return os.path.join(sys.base_exec_prefix, "bin", "python3")


def _talk(process: subprocess.Popen[bytes], job: bytes, timeout: float | None) -> bytes:
    """Hand over the job and read the answer.  The pipe stays open: its end is the parent's."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(job)  # far less than a pipe holds
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = None if timeout is None else threading.Timer(timeout, expire)
    if timer is not None:
        timer.daemon = True
        timer.start()
    said = process.stdout.read()
    if timer is not None:
        timer.cancel()
        if expired.is_set():
            raise subprocess.TimeoutExpired(process.args, timer.interval)
    return said


def _last(messages: object) -> str:
    """The last line that a process wrote to its standard error."""
    file = cast("tempfile._TemporaryFileWrapper[bytes]", messages)
    file.seek(0)
    lines = file.read().decode(errors="replace").split("\n")
    text = [line for line in lines if line.strip()]
    return f": {text[-1]}" if text else ""


# --- the child ------------------------------------------------------------------------------------


def main() -> None:
    """Verify what standard input says; the answer is one JSON object on standard output."""
    job: Job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    clock = SystemClock()
    answer: dict[str, object]
    try:
        with closing(RetryingStore(open_store(job.store, clock), clock)) as store:
            found = verify(
                store,
                clock,
                job.directory / "verify",
                database=job.database,
                directory=job.directory,
                be_gentle=lambda: os.nice(_NICE),
            )
            answer = asdict(found)
    except ReplicaError as error:
        answer = {"error": str(error)}
    except KeyboardInterrupt:
        return
    json.dump(answer, sys.stdout)


def _end_with_parent() -> None:
    """Standard input ends with the process at its other end."""
    while sys.stdin.buffer.read(4096):
        pass
    _thread.interrupt_main()
    time.sleep(_END_S)
    os._exit(1)
