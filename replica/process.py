"""Which process this is, in a way that another process can judge later: is it gone?

A process is named by the boot of its kernel, its process id namespace, its id and its start time.
Only a process in the same namespace of the same boot can tell that it is gone; everybody else, and
every system without Linux's ``/proc``, does not know.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["is_gone", "started_ms", "this_process"]


def this_process() -> str:
    """The name of this process; empty where none can be given."""
    found = _look(os.getpid())
    surroundings = _surroundings()
    return f"{surroundings}/{os.getpid()}/{found.started}" if found and surroundings else ""


def is_gone(process: str) -> bool:
    """Whether the process with this name is sure not to exist any more."""
    surroundings, _, rest = process.rpartition("/")
    surroundings, _, pid = surroundings.rpartition("/")
    if not (surroundings and pid.isdigit() and rest.isdigit()):
        return False
    if surroundings != _surroundings():
        return False
    try:
        # ``/proc`` may hide processes of other users; this does not.
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass  # it exists, and is another user's
    found = _look(int(pid))
    return found is not None and (found.dead or found.started != int(rest))


def started_ms(pid: int) -> int | None:
    """When a process was started, milliseconds since the Unix epoch; None if nobody knows."""
    found = _look(pid)
    if found is None or found.dead:
        return None
    try:
        boot = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return None if boot is None else int(boot[1]) * 1000 + found.started * 1000 // ticks_per_s


def _surroundings() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class _Found(NamedTuple):
    """A process: when it was started, in the kernel's ticks since boot, and whether it has ended
    and only waits for its parent to notice."""

    started: int
    dead: bool


def _look(pid: int) -> _Found | None:
    """None if it cannot be seen."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
        # The name, in parentheses, may hold anything.
        fields = status.rpartition(")")[2].split()
        return _Found(int(fields[19]), fields[0] in "ZX")
    except (OSError, IndexError, ValueError):
        return None
