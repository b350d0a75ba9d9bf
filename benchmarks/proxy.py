"""A TCP proxy before the store, in its own process: it records requests and may add distance.

    python proxy.py HOST:PORT DELAY_MS LOG

It prints its port, then forwards until its standard input ends.  With a delay every byte takes
half of it each way, and a new connection one round trip more, as to a store that far away.  A line
``down`` on its standard input makes the store unreachable (connections are cut, new ones refused)
and ``up`` brings it back; each is answered with a line.

Each answered request becomes one line of JSON in LOG: ``t0`` (its first byte arrived here), ``t1``
(the store's answer arrived here: the object is in the store), both CLOCK_MONOTONIC in ns, which all
processes of a machine share; ``method``, ``path``, ``status``.

HTTP is only watched: clients here never send a request before the answer to the last one came.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

_REQUEST = re.compile(rb"([A-Z]+) (\S+) HTTP/1\.[01]\r\n")
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")


class _Conversation:
    """Follows request and answer of one connection."""

    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._open: tuple[int, str, str] | None = None

    def sent(self, data: bytes) -> None:
        if self._open is None and (found := _REQUEST.match(data)):
            path = found[2].decode("latin-1").partition("?")[0]
            self._open = time.monotonic_ns(), found[1].decode(), path

    def answered(self, data: bytes) -> None:
        found = _STATUS.match(data)
        if self._open is None or found is None or found[1] == b"100":
            return
        t0, method, path = self._open
        self._open = None
        line = {
            "t0": t0,
            "t1": time.monotonic_ns(),
            "method": method,
            "path": path,
            "status": int(found[1]),
        }
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()


async def _deliver(queue: asyncio.Queue[tuple[float, bytes]], to: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due, data = await queue.get()
        if (left := due - loop.time()) > 0:
            await asyncio.sleep(left)
        if not data:
            break
        to.write(data)
        await to.drain()
    with contextlib.suppress(OSError):
        to.write_eof()


async def _pump(
    source: asyncio.StreamReader,
    to: asyncio.StreamWriter,
    delay_s: float,
    first_s: float,
    early: Any,
    late: Any,
) -> None:
    """Forward one direction; ``late`` sees the bytes when they leave here, ``early`` on arrival."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    sender = asyncio.create_task(_deliver(queue, to))
    held_until = loop.time() + first_s
    try:
        while True:
            data = await source.read(262_144)
            if data:
                early(data)
            queue.put_nowait((max(loop.time() + delay_s, held_until), data))
            if not data:
                break
        await sender
    except (ConnectionError, OSError):
        sender.cancel()
    finally:
        late()


async def _serve(host: str, port: int, delay_s: float, log: TextIO) -> None:
    open_now: set[asyncio.StreamWriter] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now.add(writer)
        try:
            await forward(reader, writer)
        finally:
            open_now.discard(writer)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.close()
            return
        talk = _Conversation(log)
        both = asyncio.gather(
            _pump(
                reader,
                upstream_writer,
                delay_s / 2,
                delay_s,
                talk.sent,
                upstream_writer.close,
            ),
            _pump(upstream_reader, writer, delay_s / 2, 0.0, talk.answered, writer.close),
        )
        with contextlib.suppress(ConnectionError, OSError):
            await both

    own_port = 0
    while True:
        server = await asyncio.start_server(connected, "127.0.0.1", own_port)
        own_port = server.sockets[0].getsockname()[1]
        print(own_port, flush=True)
        async with server:
            if await _next_command() != "down":
                return
        for writer in list(open_now):
            writer.transport.abort()
        print("down", flush=True)
        if await _next_command() != "up":
            return


async def _next_command() -> str:
    loop = asyncio.get_running_loop()
    return (await loop.run_in_executor(None, sys.stdin.readline)).strip()


@dataclass(frozen=True)
class Request:
    """One answered request; times are CLOCK_MONOTONIC, seconds."""

    t0: float
    t1: float
    method: str
    path: str
    status: int

    @property
    def is_put(self) -> bool:
        return self.method == "PUT" and self.status == 200


@dataclass(frozen=True)
class Proxy:
    """A running proxy.

    Attributes:
        url: for clients of the store.
        log: its record of requests.
        delay_ms: what it adds to a request.
    """

    url: str
    log: Path
    delay_ms: float
    _process: subprocess.Popen[str]

    def latencies_ms(self, requests: Iterable[Request]) -> list[float]:
        """What each took on its way to the store and back, without the client's own work."""
        return [(r.t1 - r.t0) * 1e3 + self.delay_ms / 2 for r in requests]

    def down(self) -> None:
        """Make the store unreachable."""
        self._tell("down")

    def up(self) -> None:
        """Bring it back, under the same address."""
        self._tell("up")

    def _tell(self, command: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise OSError("the proxy has ended")

    def requests(self) -> list[Request]:
        """What was answered so far."""
        found = []
        for text in self.log.read_text().splitlines():
            line = json.loads(text)
            found.append(
                Request(
                    line["t0"] / 1e9, line["t1"] / 1e9, line["method"], line["path"], line["status"]
                )
            )
        return found


@contextlib.contextmanager
def proxy(store_url: str, log: Path, delay_ms: float = 0.0) -> Iterator[Proxy]:
    """Run a proxy before ``store_url`` until the block ends."""
    target = store_url.removeprefix("http://")
    process = subprocess.Popen(
        [sys.executable, __file__, target, str(delay_ms), str(log)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        port = int(process.stdout.readline())
        yield Proxy(f"http://127.0.0.1:{port}", log, delay_ms, process)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


if __name__ == "__main__":
    _host, _, _port = sys.argv[1].partition(":")
    with open(sys.argv[3], "w") as _log:
        asyncio.run(_serve(_host, int(_port), float(sys.argv[2]) / 1000, _log))
