"""A child process that works for the engine: what would take the GIL, caches and memory of the
application is done in there.

`Child` is the side of the engine, `serve` that of the child.  The child gets what it needs through
its standard input, never by its arguments or its environment, and answers on its standard output.
It may ask for permission in between.  It ends with its parent, however that ends: then its standard
input does.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, Final

from .errors import ReplicaError

__all__ = ["Child", "ChildError", "Slots", "serve"]

#: How long a child may take to end, seconds: to clean up once its parent is gone; when killed.
_END_S: Final = 5.0
#: How often one that waits for its turn looks up, seconds.
_LOOK_UP_S: Final = 0.2


class _Question:
    """The child asks whether it may go on; everything else that it sends is the outcome."""


class ChildError(ReplicaError):
    """No child could be started, or it ended without an answer: it failed, or it was killed."""


class Child:
    """One child and its one task.  `run` is for one thread; the rest may be called from any.

    Args:
        module: whose ``main`` the child runs; that calls `serve`.
        nice: added to this process's niceness: 0 (the same priority) to 19 (the lowest).
    """

    def __init__(self, module: str, *, nice: int = 0) -> None:
        self._module = module
        self._nice = nice
        # Guards `_process` and `_killed`.
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    @property
    def is_killed(self) -> bool:
        """Whether `kill` was called."""
        return self._killed

    def run(
        self,
        task: object,
        *,
        timeout: float | None = None,
        permit: Callable[[], object] = lambda: None,
    ) -> Any:
        """Have a task done, and wait for the outcome.

        Args:
            task: what `serve` hands to the work there; can be pickled.
            timeout: seconds.
            permit: called in this thread when the child asks; if it raises, the child is killed.

        Returns:
            What the work returned.

        Raises:
            ChildError: there is no outcome.
        """
        with contextlib.ExitStack() as stack:
            try:
                messages = stack.enter_context(tempfile.TemporaryFile())
                process = self._begin(messages.fileno())
            except OSError as error:
                raise ChildError(f"no process can be started for it: {error}") from error
            stack.callback(self._end)
            try:
                with _ended_after(process, timeout):
                    return _talk(process, pickle.dumps(task), permit)
            except (EOFError, pickle.UnpicklingError) as error:
                _wait(process)
                text = f"its process ended with {process.returncode}{_last(messages)}"
                raise ChildError(text) from error

    def _begin(self, messages: int) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._killed:
                raise ChildError("it was ended before it began")
            self._process = _start(self._module, self._nice, messages)
            return self._process

    def kill(self, *, wait: bool = True) -> None:
        """End it at once.

        Args:
            wait: until it is gone: then it holds no lock and sends nothing any more.
        """
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()
                if wait:
                    _wait(self._process)

    def forget(self) -> None:
        """In a forked child: it is the parent's, whose end must not go unnoticed because of us."""
        self._lock = threading.Lock()
        self._killed = True
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0  # nobody is to wait for it here
            _close(process)

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            _wait(process)
            _close(process)


class Slots:
    """Bounds how many children a process has at once.  Thread-safe.

    Args:
        n: so many.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._free = threading.Semaphore(n)

    @contextlib.contextmanager
    def taken(self, look_up: Callable[[], object]) -> Iterator[None]:
        """Wait for a slot, and have it; ``look_up`` raises when it is not wanted any more."""
        free = self._free
        while not free.acquire(timeout=_LOOK_UP_S):
            look_up()
        try:
            yield
        finally:
            free.release()

    def forget(self) -> None:
        """In a forked child, which has no children."""
        self._free = threading.Semaphore(self._n)


def _start(module: str, nice: int, messages: int) -> subprocess.Popen[bytes]:
    # Modules are found where this process finds them; Ctrl-C in a terminal is not for the child.
    lines = [
        f"import os, sys; os.nice({nice})",
        f"sys.path[:] = {sys.path!r}",
        f"from {module} import main; main()",
    ]
    return subprocess.Popen(
        [_python(), "-c", "; ".join(lines)],
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


def _talk(process: subprocess.Popen[bytes], task: bytes, permit: Callable[[], object]) -> Any:
    """Hand over the task and read the answer.  The pipe stays open: its end is the parent's."""
    assert process.stdout is not None
    _send(process, task)
    with open(process.stdout.fileno(), "rb", closefd=False) as answers:
        while isinstance(said := pickle.load(answers), _Question):
            permit()
            _send(process, b".")
    return said


def _send(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    rest = memoryview(data)
    with contextlib.suppress(BrokenPipeError):  # it has ended, and what it said tells why
        while rest:
            rest = rest[process.stdin.write(rest) :]


@contextlib.contextmanager
def _ended_after(process: subprocess.Popen[bytes], timeout: float | None) -> Iterator[None]:
    if timeout is None:
        yield
        return
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(timeout, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (EOFError, pickle.UnpicklingError):
        if expired.is_set():
            raise ChildError(f"it was not done after {timeout:g} s") from None
        raise
    finally:
        timer.cancel()


def _wait(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel
        process.wait(_END_S)


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _last(messages: IO[bytes]) -> str:
    """The last line that a process wrote to its standard error."""
    messages.seek(0)
    lines = messages.read().decode(errors="replace").split("\n")
    text = [line for line in lines if line.strip()]
    return f": {text[-1]}" if text else ""


# --- the child ------------------------------------------------------------------------------------


def serve(work: Callable[[Any, Callable[[], None]], object], *, clean_up: bool) -> None:
    """Do what the parent wants, and answer.

    Args:
        work: gets the task, and a function that returns when the parent permits to go on; what it
            returns is the outcome.
        clean_up: whether the work is interrupted (``KeyboardInterrupt``), and has some seconds,
            when the parent is gone.  Otherwise the process ends at that moment.
    """
    # Whatever prints something does not answer.
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        task = pickle.load(sys.stdin.buffer)
        permissions = threading.Semaphore(0)
        listener = threading.Thread(target=_listen, args=(permissions, clean_up), daemon=True)
        listener.start()

        def say(message: object) -> None:
            pickle.dump(message, answers)
            answers.flush()

        def ask() -> None:
            say(_Question())
            permissions.acquire()

        with contextlib.suppress(KeyboardInterrupt):
            say(work(task, ask))


def _listen(permissions: threading.Semaphore, clean_up: bool) -> None:
    """Standard input ends with the process at its other end."""
    while os.read(sys.stdin.fileno(), 1):
        permissions.release()
    if clean_up:
        _thread.interrupt_main()
        time.sleep(_END_S)
    os._exit(1)
