"""What becomes of a request when the store, the network or the keys fail: seen at the wire.

Each way to fail is tried with each method: the kind of error, whether trying again makes sense,
whether a write may have happened, the code, and that nothing was sent twice.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import urllib3

from support.clock import FakeClock
from support.recording import (
    Answer,
    RecordingEndpoint,
    Request,
    error_answer,
    recording_endpoint,
    reset,
)
from walship.replica.config.sources import parse_replica
from walship.replica.errors import PreconditionFailed, StoreError, StoreUnavailable
from walship.replica.store import s3
from walship.replica.store.base import ObjectStore
from walship.replica.store.opening import open_store

KEYS = {"AWS_ACCESS_KEY_ID": "first", "AWS_SECRET_ACCESS_KEY": "secret-of-first"}
MIB = 1024 * 1024

#: Every method, each as one request.
CALLS: dict[str, Callable[[ObjectStore], object]] = {
    "put": lambda store: store.put("0000/a", b"x"),
    "create": lambda store: store.put("0000/a", b"x", if_absent=True),
    "swap": lambda store: store.put("0000/a", b"x", if_match="tag"),
    "delete": lambda store: store.delete(["0000/a"]),
    "get": lambda store: store.get("0000/a", 0, 5),
    "read": lambda store: store.read("0000/a"),
    "head": lambda store: store.head("0000/a"),
    "list": lambda store: list(store.list("0000/")),
}
WRITES = {"put", "create", "swap", "delete"}


@pytest.fixture
def endpoint() -> Iterator[RecordingEndpoint]:
    """A recording endpoint."""
    with recording_endpoint() as running:
        yield running


@contextlib.contextmanager
def opened(
    url: str,
    environ: dict[str, str] | None = None,
    clock: FakeClock | None = None,
    timeout: str = "30s",
) -> Iterator[ObjectStore]:
    """A store below ``b/p`` at an endpoint, with static keys unless ``environ`` has others."""
    settings = parse_replica(
        f"s3://b/p?endpoint={url}&read-timeout={timeout}&connect-timeout={timeout}",
        environ=KEYS if environ is None else environ,
    )
    store = open_store(settings.store, clock or FakeClock())
    try:
        yield store
    finally:
        store.close()


def failure(store: ObjectStore, call: str) -> StoreError:
    """The error that a call ends with."""
    with pytest.raises(StoreError) as caught:
        CALLS[call](store)
    error = caught.value
    assert "\n" not in str(error)
    assert "secret-of-" not in str(error)
    if call not in WRITES:
        assert not error.ambiguous
    return error


def sent(endpoint: RecordingEndpoint) -> int:
    """How many requests came since the last time, but for those about the bucket's region, which
    the SDK sends when HEAD is refused with 400."""
    count = sum((request.method, request.path) != ("HEAD", "/b") for request in endpoint.requests)
    endpoint.requests.clear()
    return count


# --- answers that say no --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "retryable", "ambiguous", "says"),
    [
        (408, "RequestTimeout", True, True, "RequestTimeout"),
        (408, "RequestCanceled", True, True, "RequestCanceled"),  # what Tigris sheds load with
        (409, "ConditionalRequestConflict", True, False, "Conflict"),
        (409, "SomeOtherConflict", True, False, "Conflict"),
        (429, "TooManyRequests", True, True, "TooManyRequests"),
        (500, "InternalError", True, True, "InternalError"),
        (502, "BadGateway", True, True, "BadGateway"),
        (503, "SlowDown", True, False, "SlowDown"),
        (503, "ServiceUnavailable", True, True, "ServiceUnavailable"),
        (504, "GatewayTimeout", True, True, "GatewayTimeout"),
        (507, "XMinioStorageFull", True, True, "StorageFull"),
        (403, "RequestTimeTooSkewed", False, False, "clock of this machine is wrong"),
        (400, "ExpiredToken", False, False, "expired.*start again"),
        (400, "ExpiredTokenException", False, False, "expired.*start again"),
        (400, "TokenRefreshRequired", False, False, "expired.*start again"),
        (403, "InvalidAccessKeyId", False, False, "AWS_ACCESS_KEY_ID"),
        (400, "InvalidToken", False, False, "AWS_SESSION_TOKEN"),
        (403, "SignatureDoesNotMatch", False, False, "AWS_SECRET_ACCESS_KEY"),
        (403, "AccessDenied", False, False, "may list, read, write and delete"),
        (404, "NoSuchBucket", False, False, "bucket 'b' does not exist"),
        (501, "NotImplemented", False, False, "NotImplemented"),
    ],
)
def test_refusals(
    endpoint: RecordingEndpoint,
    status: int,
    code: str,
    retryable: bool,
    ambiguous: bool,
    says: str,
) -> None:
    """Each error document becomes its kind of error, once, with advice where there is any."""
    endpoint.answer = lambda request: error_answer(status, code)
    with opened(endpoint.url) as store:
        for call in CALLS:
            error = failure(store, call)
            assert sent(endpoint) == 1
            if call == "head":  # which has no document: the status must do
                assert error.retryable is retryable
                assert error.code == str(status)
                continue
            assert type(error) is (StoreUnavailable if retryable else StoreError)
            assert (error.retryable, error.code) == (retryable, code)
            assert error.ambiguous is (ambiguous and call in WRITES)
            assert re.search(says, str(error)), error


@pytest.mark.parametrize(
    "body", [b"", b"<html><h1>Bad Gateway</h1><hr>", b"\x00\xff no text"], ids=["no", "html", "bin"]
)
def test_refusals_of_something_between(endpoint: RecordingEndpoint, body: bytes) -> None:
    """An error without an S3 document, as proxies send it, is judged by its status."""
    with opened(endpoint.url) as store:
        for status in (408, 409, 429, 500, 502, 503, 504, 507):
            endpoint.answer = lambda request, status=status: Answer(status, body)
            for call in CALLS:
                error = failure(store, call)
                assert sent(endpoint) == 1
                assert type(error) is StoreUnavailable
                assert error.code == str(status)
                assert error.ambiguous is (status != 409 and call in WRITES)


def test_a_swap_that_finds_nothing(endpoint: RecordingEndpoint) -> None:
    """Stores answer 412 or 404 to If-Match on a missing key: both mean that the swap lost."""
    with opened(endpoint.url) as store:
        for status, code in ((412, "PreconditionFailed"), (404, "NoSuchKey")):
            endpoint.answer = lambda request, s=status, c=code: error_answer(s, c)
            error = failure(store, "swap")
            assert type(error) is PreconditionFailed
            assert not error.ambiguous
    assert endpoint.requests[0].headers["if-match"] == '"tag"'
    assert "if-match" in endpoint.requests[0].signed_headers


def test_a_bucket_that_comes_back(endpoint: RecordingEndpoint) -> None:
    """A bucket that is gone for a while is no reason to open the store anew."""
    with opened(endpoint.url) as store:
        store.put("0000/a", b"1")
        endpoint.answer = lambda request: error_answer(404, "NoSuchBucket")
        for call in CALLS:
            if call != "head":
                assert failure(store, call).code == "NoSuchBucket"
        endpoint.answer = None
        assert store.get("0000/a") == b"1"
        store.put("0000/b", b"2")


# --- successes that are none ----------------------------------------------------------------------

_PAGE = b"<html><head/><body><p>Please log in</p></body></html>"


@pytest.mark.parametrize(
    "body", [_PAGE, b"<p>Log in<br>", b"", b"\x00\xff"], ids=["xhtml", "html", "empty", "binary"]
)
def test_a_page_of_somebody_else(endpoint: RecordingEndpoint, body: bytes) -> None:
    """200 with a login page is no success: nothing counts as stored, no bucket looks empty."""
    endpoint.answer = lambda request: Answer(200, body, {"Content-Type": "text/html"})
    with opened(endpoint.url) as store:
        for call in CALLS.keys() - {"delete"}:
            error = failure(store, call)
            assert sent(endpoint) == 1
            assert type(error) is StoreUnavailable
            # The SDK itself takes some for a 500.
            assert error.code in ("UnusableAnswer", "ResponseParserError", "500")
            assert error.ambiguous is (call in WRITES)


def test_a_page_of_somebody_else_for_parts(endpoint: RecordingEndpoint) -> None:
    """An upload in parts is not started, continued or completed by a login page."""
    for stage in ("uploads", "partNumber", "uploadId"):
        endpoint.answer = lambda request, stage=stage: (
            Answer(200, _PAGE)
            if stage in request.query and (stage != "uploadId" or request.method == "POST")
            else None
        )
        with opened(endpoint.url) as store, pytest.raises(StoreUnavailable) as caught:
            store.put("0009/big", bytes(6 * MIB))
        assert caught.value.code == "UnusableAnswer"
        # Only the completion can have made an object.
        assert caught.value.ambiguous is (stage == "uploadId")
    assert not endpoint.objects


def test_other_bytes_than_were_asked_for(endpoint: RecordingEndpoint) -> None:
    """A range that is not the one asked for is an error, never shorter or other content."""
    with opened(endpoint.url) as store:
        for told, sent in (
            ("bytes 0-2/10", b"012"),  # less than is there
            ("bytes 1-5/10", b"12345"),
            ("bytes 0-4/10", b"0123"),
            ("bytes 0-5/10", b"012345"),
        ):
            answer = Answer(206, sent, {"ETag": '"1"', "Content-Range": told})
            endpoint.answer = lambda request, answer=answer: answer
            assert failure(store, "get").code == "UnusableAnswer"
        endpoint.answer = lambda request: Answer(
            206, b"012", {"ETag": '"1"', "Content-Range": "bytes 0-2/3"}
        )
        assert store.get("0000/a", 0, 5) == b"012"


@pytest.mark.parametrize("lacking", ["ETag", "Last-Modified", "Date"])
def test_a_version_needs_tag_and_times(endpoint: RecordingEndpoint, lacking: str) -> None:
    """read gives a tag and an age by the store's clock, or nothing."""
    lines = {
        "ETag": '"1"',
        "Last-Modified": "Mon, 06 Jan 2025 10:00:00 GMT",
        "Date": "Mon, 06 Jan 2025 10:00:07 GMT",
    }

    def speak(connection: socket.socket) -> None:
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        text += "Connection: close\r\nContent-Length: 1\r\n"
        connection.sendall(f"HTTP/1.1 200 OK\r\n{text}\r\nx".encode())

    endpoint.answer = lambda request: Answer(speak=speak)
    with opened(endpoint.url) as store:
        version = store.read("0000/a")
        assert version is not None
        assert (version.body, version.etag) == (b"x", "1")
        assert version.now_ms - version.modified_ms == 7000
        del lines[lacking]
        assert failure(store, "read").code == "UnusableAnswer"


# --- the network ----------------------------------------------------------------------------------


@contextlib.contextmanager
def nobody_listens() -> Iterator[str]:
    """A port that refuses connections."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@contextlib.contextmanager
def nobody_accepts() -> Iterator[str]:
    """A port where connecting takes for ever: the queue of its listener is full."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("nobody", "code"),
    [(nobody_listens, "EndpointConnectionError"), (nobody_accepts, "ConnectTimeoutError")],
)
def test_no_connection(
    nobody: Callable[[], contextlib.AbstractContextManager[str]], code: str
) -> None:
    """Without a connection nothing was sent: worth another try, and certainly not done."""
    with nobody() as url, opened(url, timeout="200ms") as store:
        for call in CALLS:
            error = failure(store, call)
            assert type(error) is StoreUnavailable
            assert not error.ambiguous
            assert error.code == code


def ok_then(rest: bytes) -> bytes:
    """The beginning of a success, and what follows its status line and tag."""
    return b'HTTP/1.1 200 OK\r\nConnection: close\r\nETag: "1"\r\n' + rest


def hang_up(connection: socket.socket) -> None:
    """The connection ends where an answer is expected."""


def reset_in_the_headers(connection: socket.socket) -> None:
    connection.sendall(ok_then(b"Content-Le"))
    reset(connection)


def reset_in_the_body(connection: socket.socket) -> None:
    connection.sendall(ok_then(b"Content-Length: 500\r\n\r\nshort"))
    reset(connection)


def body_too_short(connection: socket.socket) -> None:
    connection.sendall(ok_then(b"Content-Length: 500\r\n\r\nshort"))


def chunks_that_break_off(connection: socket.socket) -> None:
    connection.sendall(ok_then(b"Transfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n"))


def no_http(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")


def silence(connection: socket.socket) -> None:
    connection.recv(1)  # until the client gives up


def silence_in_the_body(connection: socket.socket) -> None:
    connection.sendall(ok_then(b"Content-Length: 500\r\n\r\nshort"))
    connection.recv(1)


#: What the SDK makes of them depends on what it was about to read.
CLOSED = {"ConnectionClosedError", "HTTPClientError", "ProtocolError", "UnusableAnswer", "500"}
QUIET = {"ReadTimeoutError", "ConnectionClosedError", "UnusableAnswer"}


@pytest.mark.parametrize(
    ("speak", "codes"),
    [
        (hang_up, CLOSED),
        (reset, CLOSED),
        (reset_in_the_headers, CLOSED),
        (reset_in_the_body, CLOSED),
        (body_too_short, CLOSED),
        (chunks_that_break_off, CLOSED),
        (no_http, CLOSED),
        (silence, QUIET),
        (silence_in_the_body, QUIET),
    ],
)
def test_a_broken_answer(
    endpoint: RecordingEndpoint, speak: Callable[[socket.socket], None], codes: set[str]
) -> None:
    """A request whose answer is lost may have been carried out, and is worth another try.  The rest
    of a content that has begun is asked for once more, and what comes is never given out."""
    quiet = codes is QUIET
    endpoint.answer = lambda request: Answer(speak=speak)
    with opened(endpoint.url, timeout="200ms" if quiet else "30s") as store:
        for call in CALLS:
            error = failure(store, call)
            assert type(error) is StoreUnavailable
            assert error.ambiguous is (call in WRITES)
            assert error.code in codes, error
            # A request that was given up so soon need not have been written down yet.
            begun = speak in (reset_in_the_body, body_too_short, chunks_that_break_off)
            assert quiet or sent(endpoint) == 1 + (begun and call == "get")


@pytest.mark.parametrize("call", ["get", "read"])
def test_a_body_that_drips(endpoint: RecordingEndpoint, call: str) -> None:
    """Bytes that come one by one end a read after a while, although there is never silence."""
    clock = FakeClock()
    n_sent = 0

    def drip(connection: socket.socket) -> None:
        nonlocal n_sent
        connection.sendall(ok_then(b"Content-Length: 100000\r\n\r\n"))
        for _ in range(100_000):
            connection.sendall(b"x")
            n_sent += 1
            clock.advance(0.01)

    endpoint.answer = lambda request: Answer(speak=drip)
    with opened(endpoint.url, clock=clock) as store:
        error = failure(store, call)
        assert type(error) is StoreUnavailable
        assert "bytes came in" in str(error)
        assert n_sent < 100_000
        endpoint.answer = None
        store.put("0000/a", b"whole")
        assert store.get("0000/a") == b"whole"


class TickingClock(FakeClock):
    """A quarter of a second passes at each look; who reads a body looks once for each piece."""

    def monotonic(self) -> float:
        self.advance(0.25)
        return super().monotonic()


def test_a_slow_body_that_comes(endpoint: RecordingEndpoint) -> None:
    """A large body may take longer than a small one: what counts is its speed."""
    clock = TickingClock()
    content = bytes(range(256)) * (16 * MIB // 256)
    endpoint.objects["b/p/0000/a"] = (content, {})
    with opened(endpoint.url, clock=clock, timeout="5s") as store:
        began = clock.monotonic()
        assert store.get("0000/a") == content
        # Pieces are of 64 KiB at most.  Silence may last 5 seconds.
        assert clock.monotonic() - began > 60


def test_an_old_urllib3(endpoint: RecordingEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bodies cannot be read as they come they are read all the same, whole or not at all."""
    for kind in urllib3.response.HTTPResponse.__mro__:
        if kind.__module__.startswith("urllib3."):
            monkeypatch.delattr(kind, "read1", raising=False)
    content = bytes(range(256)) * 1024
    with opened(endpoint.url) as store:
        store.put("0000/a", content)
        assert store.get("0000/a") == content
        endpoint.answer = lambda request: Answer(speak=body_too_short)
        assert type(failure(store, "get")) is StoreUnavailable


# --- keys that change -----------------------------------------------------------------------------


@pytest.fixture
def keys_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes the shared credentials file, the only place where the SDK finds keys; none yet."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)

    def write(key: str) -> None:
        file.write_text(
            f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret-of-{key}\n"
        )

    return write


def only(key: str, status: int = 403, code: str = "InvalidAccessKeyId") -> Callable[..., object]:
    """Makes an endpoint refuse all keys but one."""

    def answer(request: Request) -> Answer | None:
        known = f"Credential={key}/" in request.headers["authorization"]
        return None if known else error_answer(status, code)

    return answer


def keys_used(endpoint: RecordingEndpoint) -> list[str]:
    return [
        request.headers["authorization"].partition("Credential=")[2].partition("/")[0]
        for request in endpoint.requests
    ]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        (400, "ExpiredTokenException"),
        (403, "InvalidAccessKeyId"),
        (400, "InvalidToken"),
        (400, "TokenRefreshRequired"),
        (403, "SignatureDoesNotMatch"),
    ],
)
def test_rotated_keys(
    endpoint: RecordingEndpoint, keys_file: Callable[[str], None], status: int, code: str
) -> None:
    """Keys that were replaced in the shared file are found when the old ones are refused, by
    whichever request comes first, and used from then on."""
    clock = FakeClock()
    keys_file("0")
    with opened(endpoint.url, {}, clock) as store:
        for n, call in enumerate(sorted(CALLS.keys() - {"create", "swap"}), 1):
            store.put("0000/a", b"x")
            keys_file(str(n))
            endpoint.answer = only(str(n), status, code)  # type: ignore[assignment]
            endpoint.requests.clear()
            CALLS[call](store)
            # HEAD with 400 makes the SDK ask for the bucket's region, with the old keys.
            assert list(dict.fromkeys(keys_used(endpoint))) == [str(n - 1), str(n)]
            clock.advance(10)


def test_rotated_keys_in_an_upload_in_parts(
    endpoint: RecordingEndpoint, keys_file: Callable[[str], None]
) -> None:
    """Keys that change in the middle of an upload do not end it."""
    keys_file("old")

    def answer(request: Request) -> Answer | None:
        if request.query.get("partNumber") == "2":
            keys_file("new")
            endpoint.answer = only("new")  # type: ignore[assignment]
            return error_answer(403, "InvalidAccessKeyId")
        return None

    endpoint.answer = answer
    with opened(endpoint.url, {}) as store:
        store.put("0009/big", bytes(16 * MIB))
    assert len(endpoint.objects["b/p/0009/big"][0]) == 16 * MIB


def test_a_refused_condition_is_sent_once_more(
    endpoint: RecordingEndpoint, keys_file: Callable[[str], None]
) -> None:
    """The condition of a write goes with its second attempt, and a conflict there is a plain one:
    the refused attempt had no effect."""
    clock = FakeClock()
    keys_file("0")
    endpoint.objects["b/p/0000/a"] = (b"theirs", {})
    with opened(endpoint.url, {}, clock) as store:
        for n, (call, header) in enumerate((("create", "if-none-match"), ("swap", "if-match")), 1):
            keys_file(str(n))
            endpoint.answer = only(str(n))  # type: ignore[assignment]
            endpoint.requests.clear()
            error = failure(store, call)
            assert type(error) is PreconditionFailed
            assert not error.ambiguous
            assert [header in request.headers for request in endpoint.requests] == [True, True]
            clock.advance(10)
    assert endpoint.objects["b/p/0000/a"][0] == b"theirs"


def test_many_requests_find_new_keys_together(
    endpoint: RecordingEndpoint,
    keys_file: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests that are refused at the same time all go on, and the keys are read once."""
    keys_file("old")
    refused = threading.Barrier(8)
    connects = count_connects(monkeypatch)

    def put(n: int) -> None:
        store.put(f"0000/{n}", b"x")

    with opened(endpoint.url, {}) as store:
        keys_file("new")
        endpoint.answer = only("new")  # type: ignore[assignment]
        real = s3.S3Store._renewed

        def renewed(self: s3.S3Store, old: s3._Connection) -> s3._Connection | None:
            refused.wait(30)
            return real(self, old)

        monkeypatch.setattr(s3.S3Store, "_renewed", renewed)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(8)))
    assert sorted(keys_used(endpoint)) == ["new"] * 8 + ["old"] * 8
    assert len(connects) == 2


def count_connects(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows whenever a client is made."""
    made: list[object] = []
    real = s3._connect

    def connect(settings: object, sent: object) -> s3._Connection:
        made.append(settings)
        return real(settings, sent)  # type: ignore[arg-type]

    monkeypatch.setattr(s3, "_connect", connect)
    return made


def test_keys_that_stay_refused(
    endpoint: RecordingEndpoint,
    keys_file: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without other keys the refusal is final, nothing is sent twice, and the keys are looked for
    once in ten seconds, also while their file cannot be read."""
    keys_file("old")
    connects = count_connects(monkeypatch)
    clock = FakeClock()
    endpoint.answer = only("new", 400, "ExpiredToken")  # type: ignore[assignment]
    with opened(endpoint.url, {}, clock) as store:
        for _ in range(3):
            error = failure(store, "put")
            assert type(error) is StoreError
            assert "renew the credentials" in str(error)
            assert "start again" not in str(error)  # needless here
        assert len(connects) == 2
        keys_file("broken\n[[[")
        clock.advance(10)
        assert failure(store, "put").code == "ExpiredToken"
        assert len(connects) == 3
        keys_file("new")
        assert failure(store, "put").code == "ExpiredToken"
        clock.advance(10)
        store.put("0000/a", b"x")
    assert keys_used(endpoint) == ["old"] * 6 + ["new"]


def test_keys_that_come_later(
    endpoint: RecordingEndpoint, keys_file: Callable[[str], None]
) -> None:
    """A store that was opened before there were any keys finds them when they come."""
    clock = FakeClock()
    with opened(endpoint.url, {}, clock) as store:
        assert failure(store, "get").code == "NoCredentialsError"
        keys_file("new")
        clock.advance(10)
        store.put("0000/a", b"x")
    assert keys_used(endpoint) == ["new"]


def test_given_keys_are_kept(
    endpoint: RecordingEndpoint,
    keys_file: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys from settings or variables are not exchanged for others that lie about."""
    connects = count_connects(monkeypatch)
    keys_file("other")
    endpoint.answer = only("other", 400, "ExpiredToken")  # type: ignore[assignment]
    with opened(endpoint.url) as store:
        for call in CALLS:
            error = failure(store, call)
            assert not error.retryable
            if call != "head":
                assert "start again" in str(error)
    assert set(keys_used(endpoint)) == {"first"}
    assert len(connects) == 1
