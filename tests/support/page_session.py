"""Runs the blocks of one page, in order, in the working directory: a program of its own.

Reads a list of steps (JSON) from the file that it is given.  Blocks of sh run in one shell after
another, each with the directory and the variables that the one before left; blocks of Python run in
this process, which keeps their names, and may ``await``.  What is shown goes to standard output.
Ends with 1 at the first block that does not do what it should, and says which.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any, Final

import walship
import walship.aio

_STEP_S: Final = 40.0
_GONE_S: Final = 20.0


class Failed(Exception):
    """A block did not do what it should."""


@dataclass
class Session:
    """What blocks leave for those after them."""

    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    names: dict[str, Any] = field(default_factory=lambda: {"walship": walship})
    shells: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def sh(self, text: str, *, code: int = 0) -> None:
        """Run a block of sh to its end; what it started in the background goes on."""
        left = os.path.abspath(f"../left-{len(self.shells)}")
        script = f'{text}\ncode=$?\n{{ pwd; env -0; }} > {shlex.quote(left)}\nexit "$code"\n'
        process = self._start(script if code else f"set -e\n{script}")
        try:
            ended = process.wait(_STEP_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"still running after {_STEP_S:.0f} s") from None
        if ended != code:
            raise Failed(f"exit code {ended}, not {code}")
        with open(left, encoding="utf-8") as file:
            directory, _, variables = file.read().partition("\n")
        os.chdir(directory)
        self.environ = dict(each.split("=", 1) for each in variables.split("\0") if "=" in each)
        os.environ.update(self.environ)

    def server(self, text: str, url: str) -> None:
        """Start a server, which goes on until the page ends, and wait for its first answer."""
        process = self._start(text)
        deadline = time.monotonic() + _STEP_S
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(url, timeout=5).close()
                return
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"nobody answers at {url} (exit code {process.poll()})")
            time.sleep(0.1)

    def until(self, text: str, condition: str) -> None:
        """Run one command, until another one succeeds; SIGTERM then ends it with exit code 0."""
        process = self._start(f"exec {text.strip()}")
        deadline = time.monotonic() + _STEP_S
        while subprocess.run(
            ["bash", "-c", condition], env=self.environ, capture_output=True, check=False
        ).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"{condition}: not yet (exit code {process.poll()})")
            time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        if process.wait(_STEP_S) != 0:
            raise Failed(f"SIGTERM ended it with {process.returncode}")

    def python(self, text: str, where: str) -> None:
        """Run a block of Python."""
        line = int(where.rpartition(":")[2])
        code = compile("\n" * (line - 1) + text, where, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, self.names)
        if inspect.isawaitable(result):
            asyncio.run(_completed(result))

    def either(self, text: str, where: str) -> None:
        """Run commands of a shell, or a line of Python after ``>>> ``."""
        if text.startswith(">>> "):
            self.python(text.removeprefix(">>> "), where)
        else:
            self.sh(text)

    def end(self) -> None:
        """Ask what still runs to end, and wait for servers; nothing of it is left."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for process in self.shells:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
            for process in self.shells:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GONE_S)

    def _start(self, script: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            ["bash", "-c", script],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.shells.append(process)
        return process


async def _completed(awaitable: Any) -> None:
    await awaitable


def main(file: str) -> int:
    with open(file, encoding="utf-8") as opened:
        steps = json.load(opened)
    session = Session()
    try:
        for step in steps:
            print(f"--- {step['where']}", flush=True)
            try:
                for before in step.get("before", ()):
                    session.either(before, step["where"])
                if step["kind"] == "file":
                    with open(step["title"], "w", encoding="utf-8") as opened:
                        opened.write(step["text"])
                elif step["kind"] == "python":
                    session.python(step["text"], step["where"])
                elif url := step.get("serves"):
                    session.server(step["text"], url[0])
                elif condition := step.get("until"):
                    session.until(step["text"], condition[0])
                else:
                    session.sh(step["text"], code=int(step.get("exit", "0")[0]))
                for after in step.get("after", ()):
                    session.either(after, step["where"])
            except Failed as failed:
                print(f"{step['where']}: {failed}")
                return 1
            except Exception:
                traceback.print_exc(file=sys.stdout)
                return 1
    finally:
        session.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
