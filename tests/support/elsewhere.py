"""The internet as the pages know it: every host name leads to one MinIO.

MinIO speaks TLS with a certificate for all providers' names, and takes host names of buckets too.
A proxy (``HTTPS_PROXY``, which boto3, Litestream and curl heed) connects whoever asks for a host to
it.  So programs see the real names, and settings that go by them are as they would be.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from support.servers import S3Endpoint, find_minio, free_ports, run_program

__all__ = ["ACCESS_KEY_ID", "HOSTS", "SECRET_ACCESS_KEY", "Elsewhere", "elsewhere"]

#: Those of Tigris in the pages.
ACCESS_KEY_ID: Final = "tid_xxxxxxxxxxxxxxxxxxxx"
SECRET_ACCESS_KEY: Final = "tsec_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"

#: Where the pages send their requests, without the bucket's name.
HOSTS: Final = (
    "fly.storage.tigris.dev",
    "t3.storage.dev",
    "s3.amazonaws.com",
    "s3.eu-central-1.amazonaws.com",
    "0123456789abcdef.r2.cloudflarestorage.com",
    "minio",
)
_READY_S: Final = 30.0


@dataclass
class Elsewhere:
    """What runs.

    Attributes:
        port: of the proxy.
        endpoint: the MinIO behind it, by its own address.
        certificate: file with what to trust.
        asked: host and port of each connection, in order.
    """

    port: int
    endpoint: S3Endpoint
    certificate: Path
    asked: list[str] = field(default_factory=list)

    @property
    def environ(self) -> dict[str, str]:
        """What programs need to get there."""
        proxy = f"http://127.0.0.1:{self.port}"
        return {
            "HTTP_PROXY": proxy,
            "HTTPS_PROXY": proxy,
            "NO_PROXY": "127.0.0.1,localhost",
            # Go, Python's ssl and curl; boto3.  Litestream starts with no AWS_CA_BUNDLE.
            "SSL_CERT_FILE": str(self.certificate),
            "CURL_CA_BUNDLE": str(self.certificate),
            "REQUESTS_CA_BUNDLE": str(self.certificate),
        }

    def client(self) -> Any:
        """A plain boto3 client."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint.url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY_ID,
            aws_secret_access_key=SECRET_ACCESS_KEY,
            verify=str(self.certificate),
            config=Config(
                s3={"addressing_style": "path"},
                connect_timeout=5,
                read_timeout=20,
                retries={"total_max_attempts": 3},
                proxies={},
            ),
        )

    def empty_bucket(self, name: str) -> None:
        """A bucket of that name without anything in it."""
        with contextlib.closing(self.client()) as client:
            if name not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=name)
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
                keys = [{"Key": item["Key"]} for item in page.get("Contents", ())]
                if keys:
                    client.delete_objects(Bucket=name, Delete={"Objects": keys, "Quiet": True})
        self.asked.clear()

    def keys(self, bucket: str) -> list[str]:
        """What is in it."""
        with contextlib.closing(self.client()) as client:
            answer = client.list_objects_v2(Bucket=bucket)
        return [item["Key"] for item in answer.get("Contents", ())]


@contextlib.contextmanager
def elsewhere(directory: Path) -> Iterator[Elsewhere]:
    """Run it, with its files below ``directory``; there has to be a MinIO program."""
    program = find_minio()
    assert program is not None
    certificates = directory / "certificates"
    certificates.mkdir()
    certificate = _make_certificate(certificates)
    (directory / "data").mkdir()
    port, console = free_ports(2)
    command = [
        *(str(program), "server", "--quiet"),
        *("--config-dir", str(directory / "config"), "--certs-dir", str(certificates)),
        *("--address", f"127.0.0.1:{port}", "--console-address", f"127.0.0.1:{console}"),
        str(directory / "data"),
    ]
    environ = {
        "MINIO_ROOT_USER": ACCESS_KEY_ID,
        "MINIO_ROOT_PASSWORD": SECRET_ACCESS_KEY,
        "MINIO_DOMAIN": ",".join(HOSTS),
        "MINIO_BROWSER": "off",
        "MINIO_UPDATE": "off",
    }
    log = directory / "minio.log"
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(run_program(command, log, environ))
        endpoint = S3Endpoint(name="minio", url=f"https://127.0.0.1:{port}", pid=process.pid)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        made = Elsewhere(listener.getsockname()[1], endpoint, certificate)
        _wait(made, process, log)
        threading.Thread(target=_accept, args=(listener, port, made.asked), daemon=True).start()
        yield made


def _make_certificate(directory: Path) -> Path:
    names = ["IP:127.0.0.1", "DNS:localhost"]
    for host in HOSTS:
        names += [f"DNS:{host}", f"DNS:*.{host}"]
    file = directory / "public.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        + ["-subj", "/CN=elsewhere", "-addext", f"subjectAltName={','.join(names)}"]
        + ["-keyout", str(directory / "private.key"), "-out", str(file)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return file


def _wait(made: Elsewhere, process: subprocess.Popen[bytes], log: Path) -> None:
    import botocore.exceptions

    deadline = time.monotonic() + _READY_S
    while True:
        try:
            made.empty_bucket("ready")
            return
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(errors="replace")[-1500:]) from error
            time.sleep(0.1)


# --- the proxy -----------------------------------------------------------------------------------


def _accept(listener: socket.socket, port: int, asked: list[str]) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return  # closed: the tests are over
        threading.Thread(target=_serve, args=(client, port, asked), daemon=True).start()


def _serve(client: socket.socket, port: int, asked: list[str]) -> None:
    """One connection: a tunnel (CONNECT), or requests without TLS that name their host."""
    with contextlib.suppress(OSError), client:
        head = b""
        while b"\r\n\r\n" not in head:
            received = client.recv(65536)
            if not received:
                return
            head += received
        method, target = head.split(b" ", 2)[:2]
        server = socket.create_connection(("127.0.0.1", port))
        if method == b"CONNECT":
            asked.append(target.decode())
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            asked.append(target.split(b"/")[2].decode())
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            server = context.wrap_socket(server)
            server.sendall(head)
        with server:
            _pass_on(client, server)


def _pass_on(client: socket.socket, server: socket.socket) -> None:
    """Pass on what either side says until one of them ends."""
    while True:
        held = isinstance(server, ssl.SSLSocket) and server.pending()
        ready = [server] if held else select.select([client, server], [], [])[0]
        for source in ready:
            piece = source.recv(65536)
            if not piece:
                return
            (server if source is client else client).sendall(piece)
