"""What the S3 store really sends, seen by an endpoint that writes everything down."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.clock import FakeClock
from support.recording import (
    Answer,
    RecordingEndpoint,
    Request,
    error_answer,
    recording_endpoint,
    self_signed,
)
from support.wire import KEYS, endpoint_of_every_host, opened
from walship.replica.config.sources import parse_replica
from walship.replica.errors import (
    ConfigError,
    ObjectNotFound,
    PreconditionFailed,
    StoreError,
    StoreUnavailable,
)
from walship.replica.store import s3
from walship.replica.store.base import ObjectStore
from walship.replica.store.opening import open_store
from walship.replica.store.retrying import RetryingStore
from walship.replica.store.settings import S3Settings

MIB = 1024 * 1024
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


@pytest.fixture
def endpoint() -> Iterator[RecordingEndpoint]:
    """A recording endpoint, and every host name leads to it."""
    with endpoint_of_every_host() as running:
        yield running


def exercise(store: ObjectStore) -> None:
    """One request of every kind."""
    store.put("0000/a.ltx", b"content", timestamp_ms=1_736_000_000_120, if_absent=True)
    store.get("0000/a.ltx", 1, 3)
    store.head("0000/a.ltx")
    list(store.list("0000/"))
    store.put("0009/big.ltx", bytes(6 * MIB))
    store.delete(["0000/a.ltx"])


def test_tigris_by_its_name(endpoint: RecordingEndpoint) -> None:
    """The guide's Tigris endpoint gets signed payloads, region auto and the consistency header on
    every request, and no Content-MD5."""
    url = f"s3://my-bucket/app?endpoint=http://fly.storage.tigris.dev:{endpoint.port}&region=auto"
    with opened(url) as store:
        exercise(store)
    assert {request.method for request in endpoint.requests} == {
        "PUT",
        "GET",
        "HEAD",
        "POST",
    }
    for request in endpoint.requests:
        assert request.headers["host"] == f"fly.storage.tigris.dev:{endpoint.port}"
        assert request.headers["x-tigris-consistent"] == "true"
        assert "x-tigris-consistent" in request.signed_headers
        assert request.signing_region == "auto"
        assert request.headers["x-amz-content-sha256"] == hashlib.sha256(request.body).hexdigest()
        assert "content-md5" not in request.headers
        assert request.path.startswith("/my-bucket")


def test_tigris_by_the_variables_of_fly(endpoint: RecordingEndpoint) -> None:
    """With the five variables that Fly sets, `s3://` alone is enough."""
    environ = {
        **KEYS,
        "AWS_ENDPOINT_URL_S3": f"http://fly.storage.tigris.dev:{endpoint.port}",
        "AWS_REGION": "auto",
        "BUCKET_NAME": "my-bucket",
    }
    with opened("s3:///app.db", environ) as store:
        store.put("0000/a.ltx", b"x")
    request = endpoint.last("PUT")
    assert request.path == "/my-bucket/app.db/0000/a.ltx"
    assert request.headers["x-tigris-consistent"] == "true"
    assert request.signing_region == "auto"
    assert "Credential=tid_x/" in request.headers["authorization"]


def test_tigris_settings_can_be_overridden(endpoint: RecordingEndpoint) -> None:
    """Explicit settings win over those that were detected."""
    url = (
        f"s3://b/p?endpoint=http://fly.storage.tigris.dev:{endpoint.port}&signPayload=false"
        "&requireContentMD5=true&tigris-consistent=false&region=eu"
    )
    with opened(url) as store:
        exercise(store)
    for request in endpoint.requests:
        assert "x-tigris-consistent" not in request.headers
        assert request.signing_region == "eu"
    assert endpoint.last("PUT").headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    assert "content-md5" in next(r for r in endpoint.requests if "delete" in r.query).headers


def test_other_endpoints(endpoint: RecordingEndpoint) -> None:
    """Elsewhere payloads are signed, batch deletes carry Content-MD5, and nothing is chunked."""
    with opened(f"s3://bucket/p?endpoint=http://127.0.0.1:{endpoint.port}") as store:
        exercise(store)
    for request in endpoint.requests:
        assert "x-tigris-consistent" not in request.headers
        assert request.signing_region == "us-east-1"
        assert request.headers["x-amz-content-sha256"] == hashlib.sha256(request.body).hexdigest()
        assert "aws-chunked" not in request.headers.get("content-encoding", "")
        assert "x-amz-trailer" not in request.headers
        if request.method == "PUT":  # older stores know no checksum headers
            assert not [name for name in request.headers if "checksum" in name]
        assert "expect" not in request.headers
        assert request.headers["user-agent"].startswith("walship")
    delete = next(r for r in endpoint.requests if "delete" in r.query)
    digest = hashlib.md5(delete.body, usedforsecurity=False).digest()
    assert delete.headers["content-md5"] == base64.b64encode(digest).decode()
    assert "content-md5" in delete.signed_headers


def test_unsigned_payload(endpoint: RecordingEndpoint) -> None:
    """sign-payload: false leaves the body out of the signature."""
    with opened(f"s3://b/p?endpoint={endpoint.url}&sign-payload=false") as store:
        store.put("0000/a", b"x")
    assert endpoint.last("PUT").headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"


@pytest.mark.parametrize(
    ("style", "host", "path"),
    [("true", "s3.test", "/bucket/p/0000/a"), ("false", "bucket.s3.test", "/p/0000/a")],
)
def test_addressing_style(endpoint: RecordingEndpoint, style: str, host: str, path: str) -> None:
    """force-path-style puts the bucket into the path, else it is part of the host."""
    url = f"s3://bucket/p?endpoint=http://s3.test:{endpoint.port}&forcePathStyle={style}"
    with opened(url) as store:
        store.put("0000/a", b"x")
    request = endpoint.last("PUT")
    assert request.headers["host"] == f"{host}:{endpoint.port}"
    assert request.path == path


def test_region_from_the_environment(endpoint: RecordingEndpoint) -> None:
    """AWS_REGION, which boto3 itself passes over, is the signing region."""
    url = f"s3://b/p?endpoint={endpoint.url}"
    with opened(url, {**KEYS, "AWS_REGION": "eu-west-3", "AWS_DEFAULT_REGION": "no"}) as store:
        store.put("0000/a", b"x")
    assert endpoint.last("PUT").signing_region == "eu-west-3"


def test_headers_of_a_put(endpoint: RecordingEndpoint) -> None:
    """A create-only put is one request: If-None-Match, and the timestamp without trailing zeros."""
    with opened(f"s3://b/p?endpoint={endpoint.url}&storage-class=STANDARD_IA") as store:
        store.put(
            "0000/a",
            b"x",
            timestamp_ms=1_736_000_000_100,
            metadata={"walship-epoch": "7"},
            if_absent=True,
        )
    (request,) = endpoint.requests
    assert request.headers["if-none-match"] == "*"
    assert request.headers["x-amz-meta-litestream-timestamp"] == "2025-01-04T14:13:20.1Z"
    assert request.headers["x-amz-meta-walship-epoch"] == "7"
    assert request.headers["x-amz-storage-class"] == "STANDARD_IA"
    assert {"if-none-match", "x-amz-meta-litestream-timestamp"} <= request.signed_headers


def test_session_token(endpoint: RecordingEndpoint) -> None:
    """A session token is sent with the keys it belongs to."""
    with opened(f"s3://b/p?endpoint={endpoint.url}", {**KEYS, "AWS_SESSION_TOKEN": "tok"}) as store:
        store.put("0000/a", b"x")
    assert endpoint.last("PUT").headers["x-amz-security-token"] == "tok"


def test_profile(
    endpoint: RecordingEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile's keys are used, also where the environment has others."""
    file = tmp_path / "credentials"
    file.write_text("[other]\naws_access_key_id = from-profile\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with opened(f"s3://b/p?endpoint={endpoint.url}&profile=other") as store:
        store.put("0000/a", b"x")
    assert "Credential=from-profile/" in endpoint.last("PUT").headers["authorization"]
    with pytest.raises(ConfigError, match="nobody"), opened("s3://b/p?profile=nobody"):
        pass


def test_customer_key_encryption(endpoint: RecordingEndpoint) -> None:
    """SSE-C headers go with writes, parts, reads and heads, with the key's digest."""
    key = bytes(range(32))
    encoded = base64.b64encode(key).decode()
    with opened(f"s3://b/p?endpoint={endpoint.url}", sse_customer_key=encoded) as store:
        exercise(store)
    expected = {
        "x-amz-server-side-encryption-customer-algorithm": "AES256",
        "x-amz-server-side-encryption-customer-key": encoded,
        "x-amz-server-side-encryption-customer-key-md5": base64.b64encode(
            hashlib.md5(key, usedforsecurity=False).digest()
        ).decode(),
    }
    with_key = [r for r in endpoint.requests if expected.items() <= r.headers.items()]
    assert {(r.method, "partNumber" in r.query, "uploads" in r.query) for r in with_key} == {
        ("PUT", False, False),
        ("PUT", True, False),
        ("POST", False, True),
        ("GET", False, False),
        ("HEAD", False, False),
    }


def test_kms_encryption(endpoint: RecordingEndpoint) -> None:
    """sse-kms-key-id goes with whatever creates an object."""
    with opened(f"s3://b/p?endpoint={endpoint.url}&sseKmsKeyId=alias/k") as store:
        exercise(store)
    made = [r for r in endpoint.requests if r.method == "PUT" and not r.query]
    made += [r for r in endpoint.requests if "uploads" in r.query]
    assert len(made) == 2
    for request in made:
        assert request.headers["x-amz-server-side-encryption"] == "aws:kms"
        assert request.headers["x-amz-server-side-encryption-aws-kms-key-id"] == "alias/k"


def test_reads_always_have_a_range(endpoint: RecordingEndpoint) -> None:
    """Every GET of an object is a ranged one."""
    with opened(f"s3://b/p?endpoint={endpoint.url}") as store:
        store.put("0000/a", b"0123456789")
        store.get("0000/a")
        assert endpoint.last("GET").headers["range"] == "bytes=0-"
        store.get("0000/a", 3, 4)
        assert endpoint.last("GET").headers["range"] == "bytes=3-6"


def test_a_server_without_ranges(endpoint: RecordingEndpoint) -> None:
    """Where a server sends everything all the same, the range is cut out of it."""
    with opened(f"s3://b/p?endpoint={endpoint.url}") as store:
        endpoint.answer = lambda request: Answer(200, b"0123456789", {"ETag": '"1"'})
        assert store.get("0000/a", 3, 4) == b"3456"
        assert store.get("0000/a", 8) == b"89"
        assert store.get("0000/a") == b"0123456789"


def test_multipart(endpoint: RecordingEndpoint, tmp_path: Path) -> None:
    """Above the part size an upload has parts; the condition stands at its completion."""
    content = random.Random(1).randbytes(12 * MIB + 5)
    source = tmp_path / "source"
    source.write_bytes(content)
    url = f"s3://b/p?endpoint={endpoint.url}&part-size=5MiB&concurrency=3"
    with opened(url) as store:
        store.put("0009/big", source, timestamp_ms=0, if_absent=True)
        with pytest.raises(PreconditionFailed):
            store.put("0009/big", content, if_absent=True)
    assert endpoint.objects["b/p/0009/big"][0] == content
    parts = [r for r in endpoint.requests if "partNumber" in r.query][:3]
    assert sorted((r.query["partNumber"], len(r.body)) for r in parts) == [
        ("1", 5 * MIB),
        ("2", 5 * MIB),
        ("3", 2 * MIB + 5),
    ]
    start = next(r for r in endpoint.requests if "uploads" in r.query)
    assert start.headers["x-amz-meta-litestream-timestamp"] == "1970-01-01T00:00:00Z"
    complete = next(r for r in endpoint.requests if r.method == "POST" and "uploadId" in r.query)
    assert complete.headers["if-none-match"] == "*"
    assert not endpoint.uploads  # the one that lost was aborted


def test_parts_in_flight(endpoint: RecordingEndpoint) -> None:
    """No more parts are in flight than `concurrency` says, and that many are."""
    running, most, lock = 0, 0, threading.Lock()
    gate = threading.Barrier(2, timeout=20)
    original = s3._part

    def counted(body: object, start: int, length: int) -> object:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait()
        with lock:
            running -= 1
        return original(body, start, length)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "_part", counted)
        with opened(f"s3://b/p?endpoint={endpoint.url}&concurrency=2") as store:
            store.put("0009/big", bytes(20 * MIB))
    assert most == 2


def test_a_part_that_fails_is_sent_again(endpoint: RecordingEndpoint) -> None:
    """A part that fails in passing costs that part, not the upload."""
    failed: list[Request] = []

    def answer(request: Request) -> Answer | None:
        if request.query.get("partNumber") == "2" and len(failed) < 2:
            failed.append(request)
            return error_answer(503, "SlowDown")
        return None

    endpoint.answer = answer
    with opened(f"s3://b/p?endpoint={endpoint.url}") as store:
        store.put("0009/big", bytes(11 * MIB))
    assert len(failed) == 2
    assert len(endpoint.objects["b/p/0009/big"][0]) == 11 * MIB
    assert len([r for r in endpoint.requests if "partNumber" in r.query]) == 5


def test_a_failed_upload_is_aborted(endpoint: RecordingEndpoint) -> None:
    """When a part cannot be sent the upload is aborted and the error says why."""
    endpoint.answer = lambda request: (
        error_answer(403, "AccessDenied") if "partNumber" in request.query else None
    )
    with (
        opened(f"s3://b/p?endpoint={endpoint.url}") as store,
        pytest.raises(StoreError, match="AccessDenied"),
    ):
        store.put("0009/big", bytes(11 * MIB))
    assert not endpoint.uploads
    assert not endpoint.objects


def test_an_error_inside_a_completed_answer(endpoint: RecordingEndpoint) -> None:
    """A completion may answer 200 and hold an error: that is no success."""

    def answer(request: Request) -> Answer | None:
        if request.method == "POST" and "uploadId" in request.query:
            return Answer(200, b"<Error><Code>InternalError</Code><Message>m</Message></Error>")
        return None

    endpoint.answer = answer
    with (
        opened(f"s3://b/p?endpoint={endpoint.url}") as store,
        pytest.raises(StoreUnavailable) as caught,
    ):
        store.put("0009/big", bytes(6 * MIB))
    assert caught.value.ambiguous


@pytest.mark.parametrize(
    ("status", "code", "kind", "ambiguous"),
    [
        (500, "InternalError", StoreUnavailable, True),
        (503, "SlowDown", StoreUnavailable, False),
        (503, "ServiceUnavailable", StoreUnavailable, True),
        (429, "TooManyRequests", StoreUnavailable, True),
        (408, "RequestCanceled", StoreUnavailable, True),
        (400, "RequestTimeout", StoreUnavailable, True),
        (409, "ConditionalRequestConflict", StoreUnavailable, False),
        (409, "OperationAborted", StoreUnavailable, False),
        (412, "PreconditionFailed", PreconditionFailed, False),
        (403, "AccessDenied", StoreError, False),
        (403, "RequestTimeTooSkewed", StoreError, False),
        (401, "Unauthorized", StoreError, False),
        (404, "NoSuchBucket", StoreError, False),
        (501, "NotImplemented", StoreError, False),
        (400, "ExpiredToken", StoreError, False),
        (400, "InvalidRequest", StoreError, False),
    ],
)
def test_what_an_answer_means(
    endpoint: RecordingEndpoint, status: int, code: str, kind: type[StoreError], ambiguous: bool
) -> None:
    """Each answer to a put becomes its kind of error after exactly one request."""
    endpoint.answer = lambda request: error_answer(status, code, "line one\nline two")
    with opened(f"s3://b/p?endpoint={endpoint.url}") as store, pytest.raises(kind) as caught:
        store.put("0000/a", b"x")
    error = caught.value
    assert type(error) is kind
    assert error.retryable is (kind is StoreUnavailable)
    assert error.ambiguous is ambiguous
    assert error.code == code
    assert "\n" not in str(error)
    assert "tsec_y" not in str(error)
    assert len(endpoint.requests) == 1


def test_advice_about_the_clock(endpoint: RecordingEndpoint) -> None:
    """A signature refused because of the time says to set the clock."""
    endpoint.answer = lambda request: error_answer(403, "RequestTimeTooSkewed")
    with (
        opened(f"s3://b/p?endpoint={endpoint.url}") as store,
        pytest.raises(StoreError, match="clock"),
    ):
        store.get("0000/a")


def test_a_lost_answer_is_ambiguous(endpoint: RecordingEndpoint) -> None:
    """A connection that ends without an answer: the write may have happened."""
    endpoint.answer = lambda request: Answer(drop=True)
    with (
        opened(f"s3://b/p?endpoint={endpoint.url}") as store,
        pytest.raises(StoreUnavailable) as caught,
    ):
        store.put("0000/a", b"x")
    assert caught.value.ambiguous


def test_a_silent_server(endpoint: RecordingEndpoint) -> None:
    """A server that accepts and never answers ends in StoreUnavailable after read-timeout."""
    release = threading.Event()

    def answer(request: Request) -> Answer | None:
        release.wait(60)
        return None

    endpoint.answer = answer
    try:
        with (
            opened(f"s3://b/p?endpoint={endpoint.url}&read-timeout=300ms") as store,
            pytest.raises(StoreUnavailable),
        ):
            store.get("0000/a")
    finally:
        release.set()


def test_a_body_that_breaks_off(endpoint: RecordingEndpoint) -> None:
    """A read that ends early is an error that may be tried again, never short content."""
    endpoint.answer = lambda request: Answer(200, b"12345", {"Content-Length": "10"}, drop=False)
    with (
        opened(f"s3://b/p?endpoint={endpoint.url}&read-timeout=500ms") as store,
        pytest.raises(StoreUnavailable),
    ):
        store.get("0000/a")


def test_no_credentials(endpoint: RecordingEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any credentials the error names the variables to set."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with (
        opened(f"s3://b/p?endpoint={endpoint.url}", {}) as store,
        pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID") as caught,
    ):
        store.get("0000/a")
    assert not caught.value.retryable
    assert not endpoint.requests


def test_batch_deletes(endpoint: RecordingEndpoint) -> None:
    """1000 keys go with one request, and an error about one key is not passed over."""
    names = [f"0000/{n:04}" for n in range(2001)]
    with opened(f"s3://b/p?endpoint={endpoint.url}") as store:
        store.delete(names)
        sizes = [len(re.findall(rb"<Key>", r.body)) for r in endpoint.requests]
        assert sizes == [1000, 1000, 1]
        endpoint.answer = lambda request: Answer(
            body=b"<DeleteResult><Error><Key>p/0000/0001</Key><Code>AccessDenied</Code>"
            b"<Message>m</Message></Error></DeleteResult>"
        )
        with pytest.raises(StoreError, match=r"0000/0001.*AccessDenied"):
            store.delete(names[:5])


def test_listing_pages(endpoint: RecordingEndpoint) -> None:
    """A listing goes on behind its first thousand, and reads no page that nobody asks for."""
    for n in range(2500):
        endpoint.objects[f"b/p/0000/{n:06}"] = (b"", {})
    with opened(f"s3://b/p?endpoint={endpoint.url}") as store:
        found = [info.key for info in store.list("0000/", "0000/000099")]
        assert found == [f"0000/{n:06}" for n in range(100, 2500)]
        assert len(endpoint.requests) == 3
        assert endpoint.requests[0].query["start-after"] == "p/0000/000099"
        endpoint.requests.clear()
        next(iter(store.list("0000/")))
        assert len(endpoint.requests) == 1


@pytest.mark.parametrize("form", ["", "/", "./"])
def test_a_bare_bucket_continues_the_form_it_finds(endpoint: RecordingEndpoint, form: str) -> None:
    """Without a path, keys are those of the replica that is already at the bucket's top."""
    first = f"{form}0000/0000000000000001-0000000000000001.ltx"
    endpoint.objects[f"b/{first}"] = (b"1", {})
    with opened(f"s3://b?endpoint={endpoint.url}") as store:
        assert [info.key for info in store.list("0000/")] == [
            "0000/0000000000000001-0000000000000001.ltx"
        ]
        store.put("0000/0000000000000002-0000000000000002.ltx", b"2")
        assert store.get("0000/0000000000000002-0000000000000002.ltx") == b"2"
        store.delete(["0000/0000000000000001-0000000000000001.ltx"])
    assert list(endpoint.objects) == [f"b/{form}0000/0000000000000002-0000000000000002.ltx"]


@pytest.mark.parametrize(
    ("written", "form"),
    [
        ("/app", "/app/"),
        ("app/", "app//"),
        ("./app", "./app/"),
        ("a//b", "a//b/"),
        ("/app", "app/"),
        ("/", "//"),
        ("/", "/"),
        (".", "./"),
    ],
)
def test_a_path_as_litestream_takes_it(
    endpoint: RecordingEndpoint, written: str, form: str
) -> None:
    """Litestream puts keys under a `path` exactly as it is written; they are continued there."""
    endpoint.objects[f"b/{form}0009/0000000000000001-0000000000000001.ltx"] = (b"1", {})
    replica = {"bucket": "b", "path": written, "endpoint": endpoint.url}
    settings = parse_replica(replica, environ=KEYS)
    with contextlib.closing(open_store(settings.store, FakeClock())) as store:
        assert len(list(store.list("0009/"))) == 1
        store.put("0000/x", b"2")
    assert f"b/{form}0000/x" in endpoint.objects


@pytest.mark.parametrize(
    ("written", "root"), [("/app/", "app/"), ("a//./b", "a/b/"), ("/", ""), ("./", "")]
)
def test_a_path_of_a_new_replica_is_clean(
    endpoint: RecordingEndpoint, written: str, root: str
) -> None:
    """Where there is nothing yet, keys have no empty parts, whatever the path looks like."""
    replica = {"bucket": "b", "path": written, "endpoint": endpoint.url}
    settings = parse_replica(replica, environ=KEYS)
    with contextlib.closing(open_store(settings.store, FakeClock())) as store:
        store.put("0000/x", b"2")
    assert list(endpoint.objects) == [f"b/{root}0000/x"]
    endpoint.objects.clear()
    url = f"s3://b/{written}?endpoint={endpoint.url}"
    with opened(url) as store:
        store.put("0000/x", b"2")
    assert list(endpoint.objects) == [f"b/{root}0000/x"]


def test_below_a_path_as_litestream_takes_it() -> None:
    """Of a directory's databases only a slash at the beginning stays odd."""
    for written, below, odd in (
        ("/app", "app/x/a.db", "/app/x/a.db"),
        ("app/", "app/x/a.db", None),
        ("", "x/a.db", None),
    ):
        store = parse_replica({"bucket": "b", "path": written}, environ=KEYS).store.below("x/a.db")
        assert isinstance(store, S3Settings)
        assert (store.path, store.written_path) == (below, odd)


def test_a_bare_bucket_asks_once(endpoint: RecordingEndpoint) -> None:
    """That costs three LISTs, and only at first use; with a path it costs none."""
    endpoint.objects["b/0009/x"] = (b"1", {})
    with opened(f"s3://b?endpoint={endpoint.url}") as store:
        assert not endpoint.requests
        store.put("0000/a", b"")
        store.put("0000/b", b"")
    assert [request.method for request in endpoint.requests] == ["GET"] * 3 + ["PUT"] * 2
    endpoint.requests.clear()
    with opened(f"s3://b/app?endpoint={endpoint.url}") as store:
        store.put("0000/a", b"")
    assert [request.method for request in endpoint.requests] == ["PUT"]


def test_a_bare_bucket_with_two_replicas(
    endpoint: RecordingEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Where Litestream and walship were both let loose on a bare bucket, that is said."""
    for form in ("", "./"):
        endpoint.objects[f"b/{form}0000/0000000000000001-0000000000000001.ltx"] = (b"1", {})
    with opened(f"s3://b?endpoint={endpoint.url}") as store:
        store.put("0000/x", b"")
    assert "b/0000/x" in endpoint.objects
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "several-replicas bucket=b prefix='' others='./'" in warning


def test_what_litestream_needs_is_said(
    endpoint: RecordingEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """A new replica at a bucket's top says that Litestream will not find it there."""
    with caplog.at_level("INFO"), opened(f"s3://b?endpoint={endpoint.url}") as store:
        store.put("0000/x", b"")
    assert "Litestream would find one below a path only" in caplog.text


def test_an_empty_bare_bucket(endpoint: RecordingEndpoint) -> None:
    """A bucket with other things in it gets plain keys, also where odd prefixes are refused."""
    endpoint.objects["b/readme"] = (b"1", {})
    endpoint.answer = lambda request: (
        error_answer(400, "InvalidRequest") if request.query.get("prefix") == "./000" else None
    )
    with opened(f"s3://b/?endpoint={endpoint.url}") as store:
        store.put("0000/a", b"")
    assert "b/0000/a" in endpoint.objects


def test_a_bare_bucket_is_not_guessed(endpoint: RecordingEndpoint) -> None:
    """When the first LIST fails nothing is decided: the next call asks again."""
    endpoint.objects["b//0000/a"] = (b"1", {})
    endpoint.answer = lambda request: error_answer(503, "SlowDown")
    with opened(f"s3://b?endpoint={endpoint.url}") as store:
        with pytest.raises(StoreUnavailable):
            store.get("0000/a")
        endpoint.answer = None
        assert store.get("0000/a") == b"1"


@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredToken", "NoSuchBucket"])
def test_a_bare_bucket_is_not_guessed_later(endpoint: RecordingEndpoint, code: str) -> None:
    """What is refused for a reason other than its form may be there: nothing is decided."""
    endpoint.objects["b//0000/a"] = (b"1", {})
    endpoint.answer = lambda request: (
        error_answer(403, code) if request.query.get("prefix") == "/000" else None
    )
    with opened(f"s3://b?endpoint={endpoint.url}") as store:
        with pytest.raises(StoreError, match=code if code != "NoSuchBucket" else "does not exist"):
            store.get("0000/a")
        endpoint.answer = None
        assert store.get("0000/a") == b"1"


def test_a_bare_bucket_whose_policy_allows_the_plain_form(endpoint: RecordingEndpoint) -> None:
    """Once a replica is found, a refusal to list other forms does not matter."""
    endpoint.objects["b/0000/a"] = (b"1", {})
    endpoint.answer = lambda request: (
        error_answer(403, "AccessDenied") if "/" in request.query.get("prefix", "") else None
    )
    with opened(f"s3://b?endpoint={endpoint.url}") as store:
        assert store.get("0000/a") == b"1"


def test_a_bare_bucket_that_is_missing(endpoint: RecordingEndpoint) -> None:
    """A refusal of the plain form is an error, not an empty replica."""
    endpoint.answer = lambda request: error_answer(404, "NoSuchBucket")
    with (
        opened(f"s3://b?endpoint={endpoint.url}") as store,
        pytest.raises(StoreError, match="does not exist"),
    ):
        list(store.list("0000/"))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a key and a certificate of its own for localhost."""
    return self_signed(tmp_path_factory.mktemp("tls"), "localhost")


def test_certificates(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate nobody knows is refused with advice, trusted with ca-bundle, or not checked
    with skip-verify; payloads are signed over TLS too."""
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    with recording_endpoint(certificate) as endpoint:
        url = f"s3://b/p?endpoint=https://localhost:{endpoint.port}"
        with opened(url) as store, pytest.raises(StoreError, match="AWS_CA_BUNDLE") as caught:
            store.put("0000/a", b"x")
        assert not caught.value.retryable
        assert not endpoint.requests
        with pytest.raises(ConfigError, match="no such file"), opened(f"{url}&ca-bundle=/none"):
            pass
        with opened(url, {**KEYS, "AWS_CA_BUNDLE": str(certificate)}) as store:
            store.put("0000/a", b"x")
        with opened(f"{url}&skip-verify=true") as store:
            store.put("0000/b", b"x")
        assert sorted(endpoint.objects) == ["b/p/0000/a", "b/p/0000/b"]
        for request in endpoint.requests:
            expected = hashlib.sha256(request.body).hexdigest()
            assert request.headers["x-amz-content-sha256"] == expected
            assert "aws-chunked" not in request.headers.get("content-encoding", "")


def test_connections_are_kept_and_limited(endpoint: RecordingEndpoint) -> None:
    """Connections are used again; more than max-connections are not kept."""
    with opened(f"s3://b/p?endpoint={endpoint.url}&max-connections=3") as store:
        for _ in range(5):
            store.put("0000/a", b"x")
        assert endpoint.connections == 1
        assert isinstance(store, s3.S3Store)
        config: Any = store._connection.client.meta.config
        assert config.max_pool_connections == 3
        assert config.connect_timeout == 5.0


def test_own_lost_answer_through_the_retrying_store(endpoint: RecordingEndpoint) -> None:
    """A create-only put whose first answer was lost comes back as an ambiguous conflict."""

    def answer(request: Request) -> Answer | None:
        if len(endpoint.requests) == 1:
            endpoint._usual(request)
            return Answer(drop=True)
        return None

    endpoint.answer = answer
    with opened(f"s3://b/p?endpoint={endpoint.url}") as inner:
        store = RetryingStore(inner, FakeClock())
        with pytest.raises(PreconditionFailed) as caught:
            store.put("0000/a", b"mine", if_absent=True)
        assert caught.value.ambiguous
        assert store.get("0000/a") == b"mine"


def test_missing_object_on_head(endpoint: RecordingEndpoint) -> None:
    """HEAD of a missing key has no body, and is ObjectNotFound all the same."""
    with opened(f"s3://b/p?endpoint={endpoint.url}") as store, pytest.raises(ObjectNotFound):
        store.head("0000/none")


def test_url_for_people() -> None:
    """The store's own URL shows where it is and no secret."""
    url = "s3://b/p?endpoint=fly.storage.tigris.dev&region=auto"
    settings = parse_replica(url, environ=KEYS).store
    assert isinstance(settings, S3Settings)
    assert "tsec_y" not in repr(settings)
    with opened(url) as store:
        assert store.url == "s3://b/p?endpoint=fly.storage.tigris.dev"
        assert "tsec_y" not in repr(store)
