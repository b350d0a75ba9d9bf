"""Web servers with several worker processes on one database, whose workers are killed at random."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from support.databases import Database
from support.servers import free_ports

_KILLS = 6

_WSGI = """
    import os, threading, walship
    from walship.middleware import DurableWSGI

    local = threading.local()

    def database():
        if not hasattr(local, "db"):
            replica = {"path": os.environ["REPLICA"], "sync_interval": 0.0}
            local.db = walship.connect(os.environ["DATABASE"], replica, busy_timeout=30)
            local.db.execute("CREATE TABLE IF NOT EXISTS notes (id PRIMARY KEY)")
        return local.db

    def app(environ, start_response):
        database().execute("INSERT INTO notes VALUES (?)", (environ["QUERY_STRING"],))
        start_response("201 Created", [("Content-Type", "text/plain")])
        return [str(os.getpid()).encode()]

    application = DurableWSGI(app)
    """

_ASGI = """
    import os, walship
    from walship.middleware import DurableASGI

    db = None

    async def app(scope, receive, send):
        global db
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                if message["type"] == "lifespan.startup":
                    replica = {"path": os.environ["REPLICA"], "sync_interval": 0.0}
                    db = walship.connect(os.environ["DATABASE"], replica, busy_timeout=30)
                    db.execute("CREATE TABLE IF NOT EXISTS notes (id PRIMARY KEY)")
                    await send({"type": "lifespan.startup.complete"})
                else:
                    db.close()
                    await send({"type": "lifespan.shutdown.complete"})
                    return
        db.execute("INSERT INTO notes VALUES (?)", (scope["query_string"].decode(),))
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": str(os.getpid()).encode()})

    application = DurableASGI(app)
    """

SERVERS = {
    "gunicorn": (
        _WSGI,
        ["gunicorn", "--workers", "4", "--threads", "2", "--bind", "127.0.0.1:{port}", "app"],
    ),
    "uvicorn": (
        _ASGI,
        [
            "uvicorn",
            "--workers",
            "3",
            "--port",
            "{port}",
            "--log-level",
            "warning",
            "app:application",
        ],
    ),
}


@contextlib.contextmanager
def _serving(name: str, database: Database) -> Iterator[int]:
    """Run the server; its port.  Ends it with SIGTERM, and checks that it ends well."""
    source, arguments = SERVERS[name]
    (database.directory / "app.py").write_text(textwrap.dedent(source))
    (port,) = free_ports(1)
    log = database.directory / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *(word.format(port=port) for word in arguments)],
            cwd=database.directory,
            env={**os.environ, "DATABASE": str(database.path), "REPLICA": str(database.replica)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        while True:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.05)
        yield port
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


class Clients:
    """Threads that write notes until told to stop, and keep what was acknowledged."""

    def __init__(self, port: int, count: int) -> None:
        self.acknowledged: set[str] = set()
        self.pids: dict[int, int] = {}
        self._port = port
        self._changed = threading.Condition()
        self._stop = False
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        n = 0
        while not self._stop:
            n += 1
            note = f"{number}-{n}"
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=50)
            try:
                connection.request("POST", f"/?{note}")
                answer = connection.getresponse()
                body = answer.read()
                if answer.status == 201:
                    with self._changed:
                        self.acknowledged.add(note)
                        self.pids[int(body)] = len(self.acknowledged)
                        self._changed.notify_all()
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)  # its worker was killed
            finally:
                connection.close()

    def wait(self, more: int) -> int:
        """Wait for so many more acknowledgements; the process that gave the last one."""
        with self._changed:
            wanted = len(self.acknowledged) + more
            assert self._changed.wait_for(lambda: len(self.acknowledged) >= wanted, 60)
            return max(self.pids, key=lambda pid: self.pids[pid])

    def stop(self) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("server", SERVERS)
def test_workers_are_killed_under_load(tmp_path: Path, server: str) -> None:
    """Whatever a client was told is stored is in the replica; the end ships all the rest."""
    pytest.importorskip(server)
    rng = random.Random(5)
    database = Database(tmp_path)
    with _serving(server, database) as port:
        clients = Clients(port, 6)
        try:
            for _ in range(_KILLS):
                pid = clients.wait(rng.randrange(5, 40))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                told = set(clients.acknowledged)
                assert told <= _notes(database.restore())
            clients.wait(30)
        finally:
            clients.stop()
    notes = _notes(database.restore())
    assert clients.acknowledged <= notes
    assert notes == _notes(database.path)
    assert '"owner": ""' in (database.replica / "lock.json").read_text()


def _notes(path: Path) -> set[str]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE, vfs="unix")
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        return {note for (note,) in connection.execute("SELECT id FROM notes")}
    finally:
        connection.close(True)
