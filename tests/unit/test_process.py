"""Whether a process that held a lease is gone: only what is certain counts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from walship.replica import process
from walship.replica.process import is_gone, this_process

_NAME = "from walship.replica.process import this_process; print(this_process(), flush=True); "


@pytest.fixture
def other() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A process that lives, and its name."""
    command = [sys.executable, "-c", _NAME + "input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    yield child.stdout.readline().strip(), child
    child.kill()
    child.communicate()


def test_a_process_that_lives(other: tuple[str, subprocess.Popen[str]]) -> None:
    """Neither this one nor another one that runs is gone."""
    assert not is_gone(this_process())
    assert not is_gone(other[0])


def test_a_process_that_ended(other: tuple[str, subprocess.Popen[str]]) -> None:
    """It is gone at once, also while its parent has not noticed (a zombie)."""
    name, child = other
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(name)
    child.wait()
    assert is_gone(name)


def test_an_id_that_was_given_again() -> None:
    """Another process with the same id was started at another time."""
    surroundings, _, started = this_process().rpartition("/")
    assert is_gone(f"{surroundings}/{int(started) - 1}")


def test_a_process_that_is_hidden(
    other: tuple[str, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``/proc`` may be mounted so that it shows only the user's own: what is hidden lives."""
    name, child = other
    read_text = Path.read_text

    def hiding(path: Path, *args: Any, **more: Any) -> str:
        if str(path) == f"/proc/{child.pid}/stat":
            raise FileNotFoundError(path)
        return read_text(path, *args, **more)

    monkeypatch.setattr(Path, "read_text", hiding)
    assert not is_gone(name)
    child.kill()
    child.wait()
    assert is_gone(name)


@pytest.mark.parametrize(
    "name", ["", "/", "x/y", "other-boot/pid:[1]/7/123", "//7/123", "a/b/-1/-1", "a/b/x/y"]
)
def test_other_machines_and_nonsense(name: str) -> None:
    """Nobody knows: not gone."""
    assert not is_gone(name)


def test_a_machine_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``/proc`` a process has no name, and none is ever gone."""
    name = this_process()
    monkeypatch.setattr(process, "_surroundings", lambda: "")
    assert this_process() == ""
    assert not is_gone(name)
    assert not is_gone("/999999999/1")
