"""A copy that is killed while it is brought up to date, at every step in turn.

    python following.py REPLICA OUTPUT TXID... [--reader]

The output is brought from the first TXID to the next in a child that kills itself before its n-th
operation on a file; then it is opened with plain SQLite, and must hold one of the two states.  A
second child brings it to the last TXID, a segment at a time as far as that is possible, and looks
behind each transaction.  In the end its bytes are compared with a restore.  With --reader another
process has the output open all the time, so that nobody recovers its log by opening it.
Prints the number of kills; anything that is wrong is a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw

from walship.replica import follow, local_copy
from walship.replica.clock import SystemClock
from walship.replica.restore import restore
from walship.replica.store.local import LocalStore

CLOCK = SystemClock()

#: What is killed before it is done: every write and sync of log, index and note, and SQLite's own.
_OPERATIONS: tuple[tuple[Any, str], ...] = (
    (local_copy, "write_all"),
    (local_copy, "sync_data"),
    (local_copy.LocalCopy, "_read"),
    (local_copy.LocalCopy, "trim"),
    (local_copy.LocalCopy, "_release"),
    (follow, "write_durably"),
    (local_copy.os, "pwrite"),
)


def kill_before(n: int) -> None:
    """From now on this process ends with SIGKILL before its ``n``-th operation, half done."""
    count = 0

    def patched(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count == n:
                if inner is write_all:  # a write may have got anywhere
                    inner(args[0], [*args[1][: len(args[1]) // 2]], *args[2:], **keywords)
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **keywords)

        return call

    write_all = local_copy.write_all
    for owner, name in _OPERATIONS:
        setattr(owner, name, patched(getattr(owner, name)))


def in_child(function: Callable[[], object]) -> bool:
    """Run something in a forked child; False if that was killed."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "a child failed"
    return True


@contextlib.contextmanager
def reader(path: Path, wanted: bool) -> Iterator[None]:
    """Another process with an open connection, outside of a transaction."""
    if not wanted:
        yield
        return
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        connection = apsw.Connection(str(path))
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        os.write(send, b"x")
        signal.pause()
    os.read(receive, 1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(receive)
        os.close(send)


def content(path: Path) -> str:
    """Digest of what SQLite reads; the database must be sound."""
    connection = apsw.Connection(str(path))
    assert connection.pragma("integrity_check") == "ok"
    digest = hashlib.sha256()
    for (name,) in connection.execute(
        "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name"
    ).fetchall():
        for row in connection.execute(f'SELECT * FROM "{name}" ORDER BY rowid'):
            digest.update(repr((name, row)).encode())
    connection.close()
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("replica", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("txids", type=int, nargs="+")
    parser.add_argument("--reader", action="store_true")
    options = parser.parse_args()
    output: Path = options.output
    store = LocalStore(options.replica, CLOCK)
    states = {}
    first, second, last = options.txids
    for txid in range(first, last + 1):
        path = output.with_name(f"at-{txid}.db")
        restore(store, path, clock=CLOCK, txid=txid)
        in_child(lambda path=path: path.with_suffix(".digest").write_text(content(path)))  # type: ignore[misc]
        states[txid] = path.with_suffix(".digest").read_text()
    kills = 0
    while True:
        for leftover in output.parent.glob(f"{output.name}*"):
            leftover.unlink()
        in_child(lambda: follow.update(store, output, clock=CLOCK, txid=first))

        def killed(n: int = kills + 1) -> None:
            kill_before(n)
            follow.update(store, output, clock=CLOCK, txid=second)

        def look() -> None:
            assert content(output) in (states[first], states[second])

        def go_on() -> None:
            apply = follow.Follower._transaction

            def watched(*args: Any) -> follow.Step:
                step = apply(*args)
                assert content(output) == states[step.txid], "a transaction has made no state"
                return step

            follow._BATCH_BYTES = 1  # type: ignore[misc]
            follow.Follower._transaction = watched  # type: ignore[method-assign]
            follow.update(store, output, clock=CLOCK, txid=last)
            assert content(output) == states[last]

        with reader(output, options.reader):
            done = in_child(killed)
            # Whoever reads first recovers the log, unless the other reader keeps it.
            in_child(look)
            in_child(go_on)
        in_child(lambda: follow.update(store, output, clock=CLOCK))
        expected = output.with_name(f"at-{last}.db").read_bytes()
        assert output.read_bytes() == expected or options.reader
        if done:
            break
        kills += 1
    print(kills)


if __name__ == "__main__":
    sys.exit(main())
