"""A TCP proxy before a real server that cuts answers off in the middle of their bodies."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_CHUNK_BYTES = 16 * 1024


@dataclass
class CuttingProxy:
    """One running proxy.

    Attributes:
        url: ``http://127.0.0.1:<port>``.
        after_bytes: an answer that is longer is cut there.
        cuts: how many answers may still be cut.
        on_cut: called before the connection is closed.
        requests: the header lines of every request that was seen.
        n_bytes: bytes of answers that were passed on.
    """

    url: str
    after_bytes: int = 0
    cuts: int = 0
    on_cut: Callable[[], object] = bool
    requests: list[bytes] = field(default_factory=list)
    n_bytes: int = 0


@contextlib.contextmanager
def cutting_proxy(server_url: str) -> Iterator[CuttingProxy]:
    """Run a proxy before a server; every connection is cut at most once."""
    upstream = urlsplit(server_url)
    assert upstream.hostname is not None
    address = (upstream.hostname, upstream.port or 80)
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = CuttingProxy(f"http://127.0.0.1:{listener.getsockname()[1]}")
    lock = threading.Lock()
    open_now: set[socket.socket] = set()

    def up(client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(_CHUNK_BYTES):
                with lock:
                    proxy.requests.append(data.partition(b"\r\n\r\n")[0])
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def down(server: socket.socket, client: socket.socket) -> None:
        n_sent = 0
        with contextlib.suppress(OSError):
            while data := server.recv(_CHUNK_BYTES):
                if data.startswith(b"HTTP/1.1 "):
                    n_sent = 0
                with lock:
                    proxy.n_bytes += len(data)
                    n_sent += len(data)
                    cut = bool(proxy.cuts) and n_sent > proxy.after_bytes
                    proxy.cuts -= cut
                client.sendall(data)
                if cut:
                    proxy.on_cut()
                    break
        for each in (client, server):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(address)
            open_now.update((client, server))
            for work, ends in ((up, (client, server)), (down, (server, client))):
                threading.Thread(target=work, args=ends, daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for each in open_now:
            each.close()
