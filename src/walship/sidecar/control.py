"""The control socket: HTTP on a Unix socket, with Litestream's paths, fields and codes.

=====================  ==================================  ========================================
``POST /register``     ``{path, replica_url}``             ``{status, path}``
``POST /unregister``   ``{path, timeout?}``                ``{status, path, txid}``
``POST /start``        ``{path, timeout?}``                ``{status, path, txid}``
``POST /stop``         ``{path, timeout?}``                ``{status, path, txid}``
``POST /sync``         ``{path, wait?, timeout?}``         ``{status, path, txid, replicated_txid}``
``POST /wait``         ``{path, txid, timeout?}``          ``{path, txid, replicated_txid}``
``GET /txid?path=``                                        ``{txid, replicated_txid}``
``GET /list``                                              ``{databases: [{path, status, ...}]}``
``GET /info``                                              ``{version, pid, uptime_seconds, ...}``
=====================  ==================================  ========================================

An error is ``{error}`` with code 400 (bad request), 404 (unknown database), 409 (not replicating),
504 (not in time) or 500.  Times are seconds.  Who may open the socket may do all of this; it is
made for its owner only.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from walship import __version__
from walship.replica.clock import SystemClock
from walship.replica.config.sources import database_settings
from walship.replica.errors import ClosedError, ConfigError, ReplicaError
from walship.replica.plan import format_time
from walship.replica.sqlite import NotYetReplicated
from walship.vfs.registry import canonical

from .service import Service
from .worker import Worker

__all__ = ["ControlError", "ControlServer", "call"]

log = logging.getLogger("walship.sidecar")

_TIMEOUT_S: Final = 30.0
_MAX_BODY: Final = 64 * 1024

_clock: Final = SystemClock()


class ControlError(ReplicaError):
    """A request to the control socket failed.

    Attributes:
        status: the HTTP status; 0 if there was no answer.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ControlServer:
    """Serves the control socket of a `Service`, in threads.

    Args:
        service: what is controlled.
        path: the socket; one that nobody answers any more is replaced.
        permissions: its mode.

    Raises:
        ConfigError: it cannot be made, or another process answers on it.
    """

    def __init__(self, service: Service, path: str, permissions: int = 0o600) -> None:
        self.path = path
        started_ms = _clock.now_ms()

        class Handler(_Handler):
            actions = _Actions(service, started_ms)

        if _answers(path):
            raise ConfigError(f"socket: another process answers on {path}: give this one another")
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            mask = os.umask(0o177)
            try:
                self._server = _Server(path, Handler)
            finally:
                os.umask(mask)
            os.chmod(path, permissions)
        except OSError as error:
            raise ConfigError(f"socket: {path} cannot be made: {error.strerror}") from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="walship:control", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving; requests that are under way are not waited for."""
        self._server.shutdown()
        self._server.server_close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)


def call(
    path: str, method: str, target: str, body: Mapping[str, object] | None, timeout: float
) -> dict[str, Any]:
    """Send a request to a control socket and return the answer.

    Raises:
        ControlError: no answer, or one that is an error.
    """
    connection = _Connection(path, timeout)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, target, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read() or b"{}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ControlError(
            f"nobody answers on {path} ({why}): is `walship replicate` running, with "
            "`socket: {enabled: true}` in its configuration?"
        ) from error
    finally:
        connection.close()
    if response.status >= 400:
        raise ControlError(str(answer.get("error", response.reason)), response.status)
    return dict(answer)


class _Actions:
    """What the paths do; returns what is answered."""

    def __init__(self, service: Service, started_ms: int) -> None:
        self._service = service
        self._started_ms = started_ms

    def register(self, body: Mapping[str, Any]) -> dict[str, Any]:
        path = self._path(body)
        url = body.get("replica_url")
        if not isinstance(url, str) or not url:
            raise ConfigError("replica_url is missing")
        added = self._service.add(database_settings(path, url))
        return {"status": "registered" if added else "already_registered", "path": path}

    def unregister(self, body: Mapping[str, Any]) -> dict[str, Any]:
        path = self._path(body)
        txid = self._txid(path)
        known = self._service.remove(path)
        return {
            "status": "unregistered" if known else "already_unregistered",
            "path": path,
            "txid": txid,
        }

    def start(self, body: Mapping[str, Any]) -> dict[str, Any]:
        path = self._path(body)
        started = self._service.start(path)
        worker = self._worker(path)
        worker.wait_opened(_seconds(body))
        worker.sidecar()
        status = "started" if started else "already_running"
        return {"status": status, "path": path, "txid": self._txid(path)}

    def stop(self, body: Mapping[str, Any]) -> dict[str, Any]:
        path = self._path(body)
        txid = self._txid(path)
        stopped = self._service.stop(path)
        return {
            "status": "stopped" if stopped else "already_stopped",
            "path": path,
            "txid": txid,
        }

    def sync(self, body: Mapping[str, Any]) -> dict[str, Any]:
        path = self._path(body)
        sidecar = self._worker(path).sidecar()
        before = sidecar.engine.status()
        if body.get("wait"):
            txid = sidecar.sync(_seconds(body))
            status = "no_change" if txid == before.replicated_txid else "synced"
        else:
            sidecar.engine.sync_future()
            txid = before.txid
            status = "synced_local"
        after = sidecar.engine.status()
        return {
            "status": status,
            "path": path,
            "txid": txid,
            "replicated_txid": after.replicated_txid,
        }

    def wait(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Wait for a TXID at the usual pace: no upload is forced."""
        path, txid = self._path(body), body.get("txid")
        if not isinstance(txid, int) or isinstance(txid, bool) or txid < 1:
            raise ConfigError("txid is missing: a number from 1 on")
        engine = self._worker(path).sidecar().engine
        deadline = _clock.monotonic() + _seconds(body)
        while engine.uploader.replicated_txid < txid:
            if engine.uploader.fatal is not None:
                raise engine.uploader.fatal
            if _clock.monotonic() >= deadline:
                raise engine.not_yet(_seconds(body))
            _clock.sleep(0.02)
        return {"path": path, "txid": txid, "replicated_txid": engine.uploader.replicated_txid}

    def txid(self, query: Mapping[str, Any]) -> dict[str, Any]:
        status = self._worker(self._path(query)).sidecar().engine.status()
        return {"txid": status.txid, "replicated_txid": status.replicated_txid}

    def list(self, query: Mapping[str, Any]) -> dict[str, Any]:
        rows = []
        for path in self._service.paths():
            worker = self._service.worker(path)
            row: dict[str, object] = {"path": path, "status": "stopped"}
            if worker is not None:
                row["status"] = worker.state if worker.state == "replicating" else "open"
                with contextlib.suppress(ClosedError):
                    status = worker.sidecar().engine.status()
                    row["txid"], row["replicated_txid"] = status.txid, status.replicated_txid
                    if status.last_upload_ms is not None:
                        row["last_sync_at"] = format_time(status.last_upload_ms)
                if worker.error is not None:
                    row["error"] = str(worker.error)
            rows.append(row)
        return {"databases": rows}

    def info(self, query: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_seconds": (_clock.now_ms() - self._started_ms) // 1000,
            "started_at": format_time(self._started_ms),
            "database_count": len(self._service.paths()),
        }

    def _path(self, body: Mapping[str, Any]) -> str:
        path = body.get("path")
        if not isinstance(path, str) or not path:
            raise ConfigError("path is missing: which database?")
        return canonical(path)

    def _worker(self, path: str) -> Worker:
        worker = self._service.worker(path)
        if worker is not None:
            return worker
        if path in self._service.paths():
            raise ClosedError(f"{path} is stopped")
        raise KeyError(path)

    def _txid(self, path: str) -> int:
        worker = self._service.worker(path)
        if worker is None:
            return 0
        with contextlib.suppress(ClosedError):
            return worker.sidecar().engine.status().txid
        return 0


_POSTS: Final = ("register", "unregister", "start", "stop", "sync", "wait")
_GETS: Final = ("txid", "list", "info")


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    actions: _Actions
    protocol_version = "HTTP/1.1"
    timeout = 60.0

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self._answer(parts.path, _GETS, lambda: query)

    def do_POST(self) -> None:
        self._answer(urlsplit(self.path).path, _POSTS, self._body)

    def _body(self) -> Mapping[str, Any]:
        try:
            length = int(self.headers.get("Content-Length") or 0)
        except ValueError:
            length = -1
        if not 0 <= length <= _MAX_BODY:
            raise ConfigError("the body is too long, or of unknown length")
        try:
            body = json.loads(self.rfile.read(length) or b"{}")
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise ConfigError("the body is not a JSON object")
        return body

    def _answer(
        self, path: str, known: tuple[str, ...], given: Callable[[], Mapping[str, Any]]
    ) -> None:
        name = path.removeprefix("/")
        status, answer = 404, {"error": f"there is no {self.command} {path}"}
        if name in known:
            status, answer = self._carry_out(name, given)
        data = json.dumps(answer).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _carry_out(
        self, name: str, given: Callable[[], Mapping[str, Any]]
    ) -> tuple[int, dict[str, Any]]:
        try:
            return 200, getattr(self.actions, name)(given())
        except KeyError as error:
            return 404, {"error": f"{error.args[0]} is not replicated by this process"}
        except ConfigError as error:
            return 400, {"error": str(error)}
        except NotYetReplicated as error:
            return 504, {"error": str(error)}
        except ClosedError as error:
            return 409, {"error": str(error)}
        except ReplicaError as error:
            return 500, {"error": str(error)}
        except Exception as error:
            log.exception("unexpected error on the control socket")
            return 500, {"error": f"unexpected error: {error!r}"}

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *args: object) -> None:
        log.debug("control " + format, *args)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class _Connection(http.client.HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _answers(path: str) -> bool:
    """Whether a process listens on a socket; one that does not is left over."""
    if not Path(path).is_socket():
        if os.path.exists(path):
            raise ConfigError(f"socket: {path} exists and is no socket: give another path")
        return False
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def _seconds(body: Mapping[str, Any]) -> float:
    timeout = body.get("timeout") or _TIMEOUT_S
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < 1e6:
        raise ConfigError("timeout: a number of seconds is expected")
    return float(timeout)
