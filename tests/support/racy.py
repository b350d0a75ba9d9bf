"""An S3 server with faults that can be chosen; the first: it checks a condition, then writes.

Many clients at once, one thread each, objects in memory.  What separates a check from its write is
what separates them in real servers: the time in which the body goes to a disk.  It checks no
signature.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

_XML = {"Content-Type": "application/xml"}
#: What a body takes to its disk, seconds.
_DISK_S = 0.002


@dataclass(frozen=True)
class Faults:
    """What is wrong with the server; by default nothing but the race.

    Attributes:
        conditions: of PUTs.  "locked" is right; "racy" checks, then writes; "racy-update" does so
            for If-Match only; "ignored" writes; "unsupported" answers 501; "lying" answers 412 and
            writes all the same; "exists" knows If-None-Match and ignores If-Match; "vanished"
            creates what If-Match does not find.
        complete_conditions: whether completing a multipart upload looks at conditions.
        date_skew_s: seconds that the Date header is ahead.
        modified_skew_s: seconds that Last-Modified is ahead.
        metadata: whether user metadata is kept.
        not_modified: of GETs with If-None-Match.  "right"; "never" answers with the object;
            "always" says unchanged of a changed one.
        hidden: how many of the newest objects no listing shows.
        page: keys in one answer to a listing.
        pages: whether there is a second page.
        start_after: whether listings begin where they are told.
        ranges: whether GET honours them; if not, the whole object is given out as the range.
        keeps_deleted: whether a deleted object can still be seen.
        refused: what is answered with 403: "list", "put", "get", "head", "delete".
        etag: whether answers to a PUT and a GET name the same tag.
    """

    conditions: Literal[
        "locked", "racy", "racy-update", "ignored", "unsupported", "lying", "exists", "vanished"
    ] = "racy"
    complete_conditions: bool = True
    date_skew_s: int = 0
    modified_skew_s: int = 0
    metadata: bool = True
    not_modified: Literal["right", "never", "always"] = "right"
    hidden: int = 0
    page: int = 1000
    pages: bool = True
    start_after: bool = True
    ranges: bool = True
    keeps_deleted: bool = False
    refused: frozenset[str] = frozenset()
    etag: bool = True


@dataclass(frozen=True)
class Stored:
    """One object: content, ``x-amz-meta-*`` headers, seconds since the epoch."""

    content: bytes
    metadata: dict[str, str] = field(default_factory=dict)
    modified_s: float = 0.0

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.content, usedforsecurity=False).hexdigest()}"'


@dataclass(frozen=True)
class _Request:
    operation: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class _Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class RacyServer:
    """The server; use ``racy_server()`` to run one.

    Attributes:
        url: ``http://127.0.0.1:<port>``.
        objects: what there is, by ``bucket/key``.
        buckets: names that exist.
        received: called with operation and key before a request is served, if set.
    """

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.objects: dict[str, Stored] = {}
        self.buckets = {"bucket"}
        self.received: Callable[[str, str], None] | None = None
        self._uploads: dict[str, dict[int, bytes]] = {}
        self._lock = threading.Lock()  # held where the server is no racy one
        self._server = _Listener(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, request: _Request) -> _Answer:
        if self.received is not None:
            self.received(request.operation, request.key)
        if request.bucket not in self.buckets:
            return _error(404, "NoSuchBucket")
        if request.operation in self.faults.refused:
            return _error(403, "AccessDenied")
        return _OPERATIONS[request.operation](self, request)

    def _list(self, request: _Request) -> _Answer:
        query = request.query
        after = query.get("continuation-token") or ""
        if self.faults.start_after:
            after = after or query.get("start-after", "")
        newest = sorted(self.objects, key=lambda name: self.objects[name].modified_s)
        hidden = newest[len(newest) - self.faults.hidden :]
        keys = sorted(
            name.partition("/")[2]
            for name in list(self.objects)
            if name.startswith(f"{request.bucket}/{query.get('prefix', '')}") and name not in hidden
        )
        keys = [key for key in keys if key > after]
        page = keys[: min(self.faults.page, int(query.get("max-keys", "1000")))]
        more = len(keys) > len(page) and self.faults.pages
        items = [f"<IsTruncated>{str(more).lower()}</IsTruncated>"]
        if more:
            items.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        for key in page:
            stored = self.objects.get(f"{request.bucket}/{key}", Stored(b""))
            modified = time.strftime(
                "%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self._modified_s(stored))
            )
            items.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{modified}</LastModified>"
                f"<Size>{len(stored.content)}</Size><ETag>{escape(stored.etag)}</ETag></Contents>"
            )
        return _document("ListBucketResult", "".join(items))

    def _put(self, request: _Request) -> _Answer:
        if "uploadId" in request.query:
            self._uploads[request.query["uploadId"]][int(request.query["partNumber"])] = (
                request.body
            )
            return _Answer(headers={"ETag": Stored(request.body).etag})
        return self._write(request, request.body)

    def _write(self, request: _Request, content: bytes) -> _Answer:
        conditions = self.faults.conditions
        name = f"{request.bucket}/{request.key}"
        conditional = {"if-none-match", "if-match"} & set(request.headers)
        if conditional and conditions == "unsupported":
            return _error(501, "NotImplemented")
        kept = {n: v for n, v in request.headers.items() if n.startswith("x-amz-meta-")}
        racy = conditions == "racy" or (
            conditions == "racy-update" and "if-match" in request.headers
        )
        with contextlib.nullcontext() if racy else self._lock:
            refusal = self._refusal(request, name) if conditional else None
            if refusal is not None and conditions != "lying":
                return refusal
            if racy and conditional:
                time.sleep(_DISK_S)
            stored = Stored(content, kept if self.faults.metadata else {}, time.time())
            self.objects[name] = stored
        etag = stored.etag if self.faults.etag else '"another"'
        return refusal or _Answer(headers={"ETag": etag})

    def _refusal(self, request: _Request, name: str) -> _Answer | None:
        conditions = self.faults.conditions
        if conditions == "ignored":
            return None
        there = self.objects.get(name)
        if request.headers.get("if-none-match") == "*" and there is not None:
            return _error(412, "PreconditionFailed")
        expected = request.headers.get("if-match")
        if expected is None or conditions == "exists":
            return None
        if there is None:
            return None if conditions == "vanished" else _error(404, "NoSuchKey")
        return None if there.etag == expected else _error(412, "PreconditionFailed")

    def _get(self, request: _Request) -> _Answer:
        stored = self.objects.get(f"{request.bucket}/{request.key}")
        if stored is None:
            return _error(404, "NoSuchKey")
        headers = self._headers(stored)
        known = request.headers.get("if-none-match")
        not_modified = self.faults.not_modified
        unchanged = known == stored.etag or not_modified == "always"
        if known is not None and unchanged and not_modified != "never":
            return _Answer(304, headers=headers)
        asked = request.headers.get("range")
        if asked is None:
            return _Answer(200, stored.content, headers)
        if not self.faults.ranges:
            return _Answer(206, stored.content, headers)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        assert match is not None, asked
        start, size = int(match[1]), len(stored.content)
        if start >= size:
            return _error(416, "InvalidRange")
        end = min(int(match[2] or size), size - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return _Answer(206, stored.content[start : end + 1], headers)

    def _head(self, request: _Request) -> _Answer:
        stored = self.objects.get(f"{request.bucket}/{request.key}")
        if stored is None:
            return _Answer(404)
        return _Answer(200, stored.content, self._headers(stored))

    def _delete(self, request: _Request) -> _Answer:
        if "uploadId" in request.query:
            self._uploads.pop(request.query["uploadId"], None)
            return _Answer(204)
        if not self.faults.keeps_deleted:
            for key in re.findall(rb"<Key>([^<]*)</Key>", request.body):
                self.objects.pop(f"{request.bucket}/{key.decode()}", None)
        return _document("DeleteResult", "")

    def _begin(self, request: _Request) -> _Answer:
        upload = f"upload-{len(self._uploads) + 1}"
        self._uploads[upload] = {}
        return _document("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")

    def _complete(self, request: _Request) -> _Answer:
        parts = self._uploads[request.query["uploadId"]]
        if not self.faults.complete_conditions:
            for name in ("if-none-match", "if-match"):
                request.headers.pop(name, None)
        answer = self._write(request, b"".join(parts[number] for number in sorted(parts)))
        if answer.status != 200:
            return answer
        del self._uploads[request.query["uploadId"]]
        etag = escape(answer.headers["ETag"])
        return _document("CompleteMultipartUploadResult", f"<ETag>{etag}</ETag>")

    def _headers(self, stored: Stored) -> dict[str, str]:
        modified = email.utils.formatdate(self._modified_s(stored), usegmt=True)
        return {"ETag": stored.etag, "Last-Modified": modified, **stored.metadata}

    def _modified_s(self, stored: Stored) -> float:
        return stored.modified_s + self.faults.modified_skew_s


_OPERATIONS: dict[str, Callable[[RacyServer, _Request], _Answer]] = {
    "list": RacyServer._list,
    "put": RacyServer._put,
    "get": RacyServer._get,
    "head": RacyServer._head,
    "delete": RacyServer._delete,
    "begin": RacyServer._begin,
    "complete": RacyServer._complete,
}


def _operation(method: str, key: str, query: dict[str, str]) -> str:
    if method == "POST":
        return "delete" if "delete" in query else "begin" if "uploads" in query else "complete"
    if method == "GET" and not key:
        return "list"
    return {"PUT": "put", "GET": "get", "HEAD": "head", "DELETE": "delete"}[method]


def _error(status: int, code: str) -> _Answer:
    body = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>"
    return _Answer(status, body.encode(), _XML)


def _document(root: str, inner: str) -> _Answer:
    return _Answer(200, f"<{root}>{inner}</{root}>".encode(), _XML)


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # all racing writers may connect at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away is no news here


def _handler(server: RacyServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            parts = urlsplit(self.path)
            bucket, _, key = unquote(parts.path)[1:].partition("/")
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            answer = server.answer(
                _Request(
                    _operation(self.command, key, query),
                    bucket,
                    key,
                    query,
                    {name.lower(): value for name, value in self.headers.items()},
                    self.rfile.read(int(self.headers.get("Content-Length", 0))),
                )
            )
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.status not in (204, 304):
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD" and answer.body:
                self.wfile.write(answer.body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

        def date_time_string(self, timestamp: float | None = None) -> str:
            now_s = time.time() if timestamp is None else timestamp
            return super().date_time_string(now_s + server.faults.date_skew_s)  # type: ignore[arg-type]

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextlib.contextmanager
def racy_server(faults: Faults | None = None) -> Iterator[RacyServer]:
    """Run a server with one bucket, "bucket", until the block ends."""
    server = RacyServer(faults or Faults())
    thread = threading.Thread(target=server._server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._server.shutdown()
        thread.join()
        server._server.server_close()
