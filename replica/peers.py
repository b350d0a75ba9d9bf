"""What processes that share a state directory tell each other: short messages through named pipes.

Each process that has the database open reads one pipe in the state directory, named
``<process id>-<random>.fifo``.
The one that uploads writes the name of its own into the file ``leader``; the others ring its bell,
ask it to send what they have committed, and get its answers in their own pipes.  A pipe that nobody
reads any more cannot be written to, so a leader that died is noticed at the next message.

Messages are hints and questions: whatever gets lost is asked again, and the journal alone says what
is true.  A message is one line of JSON::

    {"op": "bell"}                                    there is a commit
    {"op": "sync", "from": PIPE, "id": N}             answer when all committed so far is shipped
    {"op": "status", "from": PIPE, "id": N}           how is it going?
    {"id": N, "txid": T}                              done: the newest commit is in this TXID
    {"id": N, "status": {...}}
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from .files import Files
from .sqlite import SpoolError

__all__ = ["Message", "Peers", "Pipe", "ask_leader", "read_leader"]

log = logging.getLogger("walship.peers")

Message = Mapping[str, Any]

_SUFFIX: Final = ".fifo"
_LEADER: Final = "leader"
#: How long closing waits for the thread that listens, seconds.
_JOIN_S: Final = 1.0
#: Nobody reads the pipe, it is not there, or it is full: the message is lost, as may happen.
_LOST: Final = frozenset({errno.ENXIO, errno.ENOENT, errno.EPIPE, errno.EAGAIN})


class Pipe:
    """A pipe of one's own in a state directory, read by one thread.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, files: Files, directory: Path) -> None:
        self._files = files
        self._directory = directory
        self.name = f"{os.getpid()}-{secrets.token_hex(8)}{_SUFFIX}"
        self._fd = files.make_fifo(directory / self.name)
        self._rest = b""

    def receive(self, timeout_s: float | None) -> list[Message]:
        """Messages that have come; waits for the first, for so long at most (None: without end)."""
        data = self._rest + self._files.receive(self._fd, timeout_s)
        *lines, self._rest = data.split(b"\n")
        messages: list[Message] = []
        for line in lines:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    messages.append(message)
        return messages

    def send(self, name: str, message: Message) -> bool:
        """Send to the process that reads the pipe ``name``; False if it is lost."""
        if os.path.basename(name) != name or not name.endswith(_SUFFIX):
            return False
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        try:
            fd = self._files.open(self._directory / name, os.O_WRONLY | os.O_NONBLOCK)
            try:
                self._files.write(fd, [data])
            finally:
                self._files.close(fd)
        except OSError as error:
            if error.errno not in _LOST:
                log.debug("message lost to=%s error=%s", name, error)
            return False
        return True

    def wake(self) -> None:
        """Let `receive` return."""
        with contextlib.suppress(OSError):
            self._files.write(self._fd, [b"\n"])

    def close(self, *, unlink: bool = True) -> None:
        """Stop reading.  Not while another thread is in `receive`; safe to call twice."""
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1
            if unlink:
                with contextlib.suppress(OSError):
                    self._files.unlink(self._directory / self.name)


class Peers:
    """The other processes on the same state directory, as one process sees them.  Thread-safe.

    Args:
        pipe: this process's own; closed by `close`.
        handle: called for each message, in the thread that runs `listen`; must not block.
    """

    def __init__(
        self, files: Files, directory: Path, pipe: Pipe, handle: Callable[[Message], None]
    ) -> None:
        self._files = files
        self._directory = directory
        self._pipe = pipe
        self._handle = handle
        self._leader: str | None = None
        self._ending = False
        self._thread: threading.Thread | None = None
        # Guards the questions that `ask` has open, by their numbers.
        self._lock = threading.Lock()
        self._open: dict[str, Future[Message]] = {}

    @property
    def name(self) -> str:
        """Where answers to this process go."""
        return self._pipe.name

    @property
    def leader_pid(self) -> str | None:
        """Id of the process that took the last message for the leader; None if it is gone."""
        leader = self._leader
        return None if leader is None else leader.partition("-")[0]

    def start(self) -> None:
        """Listen in a thread of its own (a daemon)."""
        self._thread = threading.Thread(target=self.listen, name="walship:peers", daemon=True)
        self._thread.start()

    def listen(self) -> None:
        """Handle messages until `close`."""
        while not self._ending:
            for message in self._pipe.receive(None):
                if not self._answers(message):
                    self.handle(message)
        self._pipe.close()

    def handle(self, message: Message) -> None:
        """Handle one message; what goes wrong is the sender's trouble."""
        try:
            self._handle(message)
        except Exception:
            if not self._ending:
                log.exception("a message could not be handled: %s", message)

    def _answers(self, message: Message) -> bool:
        with self._lock:
            future = self._open.pop(str(message.get("id")), None)
        if future is not None:
            future.set_result(message)
        return future is not None

    def ask(self, question: Message, timeout_s: float) -> Message | None:
        """The leader's answer to a question; None if there is none in time."""
        number = secrets.token_hex(4)
        future: Future[Message] = Future()
        with self._lock:
            self._open[number] = future
        try:
            if not self.tell_leader({**question, "from": self.name, "id": number}):
                return None
            return future.result(timeout_s)
        except TimeoutError:
            return None
        finally:
            with self._lock:
                self._open.pop(number, None)

    def lead(self) -> None:
        """Tell the others that this process uploads from now on; forget those that are gone.

        Call locked: pipes are made under the drain lock.

        Raises:
            SpoolError: it could not be written down.
        """
        temporary = self._directory / f"{self._pipe.name}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            fd = self._files.open(temporary, flags)
            try:
                self._files.write(fd, [self._pipe.name.encode()])
            finally:
                self._files.close(fd)
            self._files.rename(temporary, self._directory / _LEADER)
        except OSError as error:
            reason = error.strerror or str(error)
            raise SpoolError(f"cannot write the spool in {self._directory}: {reason}") from error
        for name in self._files.names(self._directory):
            if name.endswith(_SUFFIX) and name != self.name and not self._is_read(name):
                with contextlib.suppress(OSError):
                    self._files.unlink(self._directory / name)

    def _is_read(self, name: str) -> bool:
        """Whether there still is a process that reads a pipe."""
        try:
            fd = self._files.open(self._directory / name, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            return error.errno != errno.ENXIO
        self._files.close(fd)
        return True

    def tell_leader(self, message: Message) -> bool:
        """Send to the process that uploads; False if there is none, or it could not take it."""
        for _ in range(2):  # the one known may be gone, and another there
            if self._leader is None:
                self._leader = read_leader(self._files, self._directory)
            if self._leader in (None, self._pipe.name):
                self._leader = None
                return False
            if self._pipe.send(self._leader, message):
                return True
            self._leader = None
        return False

    def answer(self, name: str, message: Message) -> None:
        """Send to one that asked; whoever is gone does not miss it."""
        self._pipe.send(name, message)

    def close(self) -> None:
        """End `listen` and give up the pipe.  Safe to call twice."""
        self._ending = True
        if self._thread is None:
            self._pipe.close()
            return
        self._pipe.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    def close_in_child(self) -> None:
        """In a forked child: the pipe is the parent's."""
        self._ending = True
        self._pipe.close(unlink=False)


def ask_leader(
    files: Files, directory: Path, question: Message, timeout_s: float
) -> Message | None:
    """Ask from outside: the answer of the process that uploads; None if there is none in time."""
    leader = read_leader(files, directory)
    if leader is None:
        return None
    try:
        pipe = Pipe(files, directory)
    except OSError:
        return None
    try:
        if not pipe.send(leader, {**question, "from": pipe.name, "id": 0}):
            return None
        messages = pipe.receive(timeout_s)
        return messages[0] if messages else None
    finally:
        pipe.close()


def read_leader(files: Files, directory: Path) -> str | None:
    """Name of the pipe of the process that uploads, or did last; None if there never was one."""
    try:
        fd = files.open(directory / _LEADER, os.O_RDONLY)
    except OSError:
        return None
    try:
        return files.pread(fd, 64, 0).decode(errors="replace") or None
    finally:
        files.close(fd)
