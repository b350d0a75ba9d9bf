"""Which process this is, in a way that another process can judge later: is it gone?

A process is named by the boot of its kernel, its process id namespace, its id and its start time.
Only a process in the same namespace of the same boot can tell that it is gone; everybody else, and
every system without Linux's ``/proc``, does not know.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["is_gone", "this_process"]


def this_process() -> str:
    """The name of this process; empty where none can be given."""
    started = _start_time(os.getpid())
    return f"{_surroundings()}/{os.getpid()}/{started}" if started is not None else ""


def is_gone(process: str) -> bool:
    """Whether the process with this name is sure not to exist any more."""
    surroundings, _, rest = process.rpartition("/")
    surroundings, _, pid = surroundings.rpartition("/")
    if not (pid.isdigit() and rest.isdigit()) or surroundings != _surroundings():
        return False
    return _start_time(int(pid)) != int(rest)


def _surroundings() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> int | None:
    """When a process was started, in the kernel's ticks since boot; None if there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
        # The name, in parentheses, may hold anything.
        fields = status.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
