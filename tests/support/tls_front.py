"""A front that speaks TLS for a server that does not, so that it can be reached as https://."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["TlsFront", "tls_front"]


class TlsFront(socketserver.ThreadingTCPServer):
    """Listens on 127.0.0.1 and passes on what is in each connection; use ``tls_front``.

    Args:
        certificate: file with a certificate and its key.
        port: of the server behind it, on this machine.

    Attributes:
        port: where it listens.
    """

    daemon_threads = True

    def __init__(self, certificate: Path, port: int) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        context = self._context

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with (
                    contextlib.suppress(OSError),  # one of them went away
                    context.wrap_socket(self.request, server_side=True) as client,
                    socket.socket() as server,
                ):
                    # Not through `create_connection`: tests lead all names to the front.
                    server.connect(("127.0.0.1", port))
                    pass_on(client, server)

        super().__init__(("127.0.0.1", 0), Handler)
        self.port = int(self.server_address[1])


def pass_on(client: ssl.SSLSocket, server: socket.socket) -> None:
    """Pass on what either side says until one of them ends."""
    while True:
        ready = [client] if client.pending() else select.select([client, server], [], [])[0]
        for source in ready:
            data = source.recv(65536)
            if not data:
                return
            (server if source is client else client).sendall(data)


@contextlib.contextmanager
def tls_front(certificate: Path, port: int) -> Iterator[TlsFront]:
    """Run a front until the block ends."""
    front = TlsFront(certificate, port)
    thread = threading.Thread(target=front.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield front
    finally:
        front.shutdown()
        thread.join()
        front.server_close()
