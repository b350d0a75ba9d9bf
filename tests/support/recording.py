"""An S3 endpoint that writes down what it is sent and answers from memory.

Just enough of the protocol for one client at a time: objects, ranges, listings, batch deletes,
multipart uploads, If-Match, If-None-Match.  It checks no signature.  Answers can be replaced per
request, to play a server that misbehaves.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

_MODIFIED = "Mon, 06 Jan 2025 10:00:00 GMT"
_LISTED = "2025-01-06T10:00:00.000Z"


@dataclass(frozen=True)
class Request:
    """One request as it came in; header names are lower-case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def signed_headers(self) -> set[str]:
        """Names of the headers that the signature covers."""
        match = re.search(r"SignedHeaders=([^,]+)", self.headers.get("authorization", ""))
        return set(match[1].split(";")) if match else set()

    @property
    def signing_region(self) -> str:
        """Region in the credential scope of the signature."""
        match = re.search(r"Credential=[^/]+/\d{8}/([^/]+)/s3/", self.headers["authorization"])
        assert match is not None, self.headers["authorization"]
        return match[1]


@dataclass(frozen=True)
class Answer:
    """What to say: status, body, headers; or ``drop`` the connection without a word.

    Attributes:
        speak: says everything itself, on the connection, which ends when it returns.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    speak: Callable[[socket.socket], None] | None = None


def error_answer(status: int, code: str, message: str = "on purpose") -> Answer:
    """An S3 error document."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Answer(status, body.encode(), {"Content-Type": "application/xml"})


class RecordingEndpoint:
    """The server; use ``recording_endpoint()`` to run one.

    Attributes:
        port: where it listens on 127.0.0.1.
        requests: everything received, in order.
        objects: content and metadata headers by ``bucket/key``.
        answer: if set, asked first; None from it means: answer as usual.
        ignores_conditions: puts succeed whatever If-Match and If-None-Match say.
        address: host, and path if it has one, of the provider that it plays: buckets are in the
            path of requests to it, and in front of it in the host name of others.
        connections: how many were made.

    Args:
        certificate: file with a certificate and its key, to speak TLS.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.connections = 0
        self.ignores_conditions = False
        self.address: str | None = None
        self.requests: list[Request] = []
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.answer: Callable[[Request], Answer | None] | None = None
        self._lock = threading.Lock()
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                with endpoint._lock:
                    endpoint.connections += 1

            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                parts = urlsplit(self.path)
                request = Request(
                    self.command,
                    parts.path,
                    dict(parse_qsl(parts.query, keep_blank_values=True)),
                    {name.lower(): value for name, value in self.headers.items()},
                    self.rfile.read(length),
                )
                with endpoint._lock:
                    endpoint.requests.append(request)
                    answer = endpoint.answer(request) if endpoint.answer else None
                    if answer is None:
                        answer = endpoint._usual(request)
                if answer.speak is not None:
                    self.close_connection = True
                    with contextlib.suppress(OSError):  # the client went away
                        answer.speak(self.connection)
                    return
                if answer.drop:
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(answer.status)
                headers = {"Content-Length": str(len(answer.body)), **answer.headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that goes away is no news here

        self._server = Server(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def last(self, method: str) -> Request:
        """The latest request with this method."""
        return [request for request in self.requests if request.method == method][-1]

    def _usual(self, request: Request) -> Answer:
        host = request.headers["host"].partition(":")[0]
        path = unquote(request.path)[1:]
        own, _, folder = (self.address or "").partition("/")
        if host == own:
            path = path.removeprefix(f"{folder}/")
        elif not re.fullmatch(r"[\d.]+|localhost|fly\.storage\.tigris\.dev|[a-z0-9]+\.test", host):
            path = f"{host.partition('.')[0]}/{path}"  # virtual-host style
        bucket, _, key = path.partition("/")
        if request.method == "POST" and "delete" in request.query:
            for name in re.findall(rb"<Key>([^<]*)</Key>", request.body):
                self.objects.pop(f"{bucket}/{name.decode()}", None)
            return Answer(body=b"<DeleteResult/>")
        if request.method == "POST" and "uploads" in request.query:
            upload = f"upload-{len(self.uploads) + 1}"
            self.uploads[upload] = {}
            return Answer(body=_xml("InitiateMultipartUploadResult", UploadId=upload))
        if "uploadId" in request.query:
            return self._multipart(request, path)
        if request.method == "PUT":
            return self._put(request, path, request.body)
        if request.method == "GET" and not key:
            return self._list(bucket, request.query)
        if path not in self.objects:
            return Answer(404) if request.method == "HEAD" else error_answer(404, "NoSuchKey")
        content, headers = self.objects[path]
        headers = {"ETag": _etag(content), "Last-Modified": _MODIFIED, **headers}
        if request.method == "HEAD":
            return Answer(200, content, headers)
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Answer(304, b"", headers)
        return _ranged(content, headers, request.headers.get("range"))

    def _put(self, request: Request, path: str, content: bytes) -> Answer:
        absent = request.headers.get("if-none-match")
        expected = request.headers.get("if-match")
        if self.ignores_conditions:
            absent = expected = None
        if absent == "*" and path in self.objects:
            return error_answer(412, "PreconditionFailed")
        if expected is not None and path not in self.objects:
            return error_answer(404, "NoSuchKey")
        if expected is not None and expected != _etag(self.objects[path][0]):
            return error_answer(412, "PreconditionFailed")
        kept = {
            name: value for name, value in request.headers.items() if name.startswith("x-amz-meta-")
        }
        self.objects[path] = (content, kept)
        return Answer(headers={"ETag": _etag(content)})

    def _multipart(self, request: Request, path: str) -> Answer:
        upload = request.query["uploadId"]
        if upload not in self.uploads:
            return error_answer(404, "NoSuchUpload")
        if request.method == "DELETE":
            del self.uploads[upload]
            return Answer(204)
        if request.method == "PUT":
            self.uploads[upload][int(request.query["partNumber"])] = request.body
            return Answer(headers={"ETag": _etag(request.body)})
        parts = self.uploads[upload]
        answer = self._put(request, path, b"".join(parts[number] for number in sorted(parts)))
        if answer.status != 200:
            return answer
        del self.uploads[upload]
        return Answer(body=_xml("CompleteMultipartUploadResult", ETag=answer.headers["ETag"]))

    def _list(self, bucket: str, query: dict[str, str]) -> Answer:
        prefix = f"{bucket}/{query.get('prefix', '')}"
        after = f"{bucket}/{query.get('continuation-token') or query.get('start-after', '')}"
        limit = int(query.get("max-keys", "1000"))
        names = sorted(name for name in self.objects if name.startswith(prefix) and name > after)
        shown, more = names[:limit], len(names) > limit
        items = "".join(
            f"<Contents><Key>{escape(name.partition('/')[2])}</Key>"
            f"<LastModified>{_LISTED}</LastModified><Size>{len(self.objects[name][0])}</Size>"
            f"<ETag>{_etag(self.objects[name][0])}</ETag></Contents>"
            for name in shown
        )
        body = f"<IsTruncated>{str(more).lower()}</IsTruncated>{items}"
        if more:
            body += f"<NextContinuationToken>{shown[-1].partition('/')[2]}</NextContinuationToken>"
        return Answer(body=f"<ListBucketResult>{body}</ListBucketResult>".encode())


def reset(connection: socket.socket) -> None:
    """End a connection with RST, as a host does that lost its state."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.close(connection.detach())


@contextlib.contextmanager
def recording_endpoint(certificate: Path | None = None) -> Iterator[RecordingEndpoint]:
    """Run a recording endpoint until the block ends, with TLS if there is a certificate."""
    endpoint = RecordingEndpoint(certificate)
    thread = threading.Thread(target=endpoint._server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint._server.shutdown()
        thread.join()
        endpoint._server.server_close()


@contextlib.contextmanager
def every_host_is(endpoint: RecordingEndpoint) -> Iterator[None]:
    """Whatever host name is looked up, it is this machine: so that real names can be used."""
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        return real("127.0.0.1", port, *more, **named)

    with mock.patch.object(socket, "getaddrinfo", resolve):
        yield


@contextlib.contextmanager
def every_server_is(port: int) -> Iterator[None]:
    """Whatever host name and port is looked up, it is this port of this machine; addresses stay
    what they are."""
    real = socket.getaddrinfo

    def resolve(host: Any, asked: Any, *more: Any, **named: Any) -> Any:
        if re.fullmatch(r"[\d.]+", str(host)):
            return real(host, asked, *more, **named)
        return real("127.0.0.1", port, *more, **named)

    with mock.patch.object(socket, "getaddrinfo", resolve):
        yield


def self_signed(directory: Path, *names: str) -> Path:
    """A file with a key and a certificate of its own for these host names."""
    key, file = directory / "key.pem", directory / "both.pem"
    alternatives = ",".join(f"DNS:{name}" for name in names)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        + ["-subj", "/CN=recording", "-addext", f"subjectAltName={alternatives}"]
        + ["-keyout", str(key), "-out", str(file)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    file.write_bytes(file.read_bytes() + key.read_bytes())
    return file


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def _xml(root: str, **values: str) -> bytes:
    inner = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in values.items())
    return f"<{root}>{inner}</{root}>".encode()


def _ranged(content: bytes, headers: dict[str, str], asked: str | None) -> Answer:
    if asked is None:
        return Answer(200, content, headers)
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
    assert match is not None, asked
    start = int(match[1])
    if start >= len(content):
        return error_answer(416, "InvalidRange")
    end = min(int(match[2] or len(content)), len(content) - 1)
    headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
    return Answer(206, content[start : end + 1], headers)
