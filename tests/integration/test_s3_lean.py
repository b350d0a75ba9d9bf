"""The short way to put and read objects: the same requests as boto3's, and the same outcomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.clock import FakeClock
from support.recording import (
    Answer,
    RecordingEndpoint,
    Request,
    error_answer,
)
from support.signing import authorization, constant
from support.wire import KEYS, endpoint_of_every_host, lean_requests, opened
from walship.replica.config.sources import parse_replica
from walship.replica.errors import StoreError
from walship.replica.store.base import ObjectStore, Version
from walship.replica.store.opening import open_store

DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def endpoint() -> Iterator[RecordingEndpoint]:
    """A recording endpoint, and every host name leads to it."""
    with endpoint_of_every_host() as running:
        yield running


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operations that went the short way, in order."""
    return lean_requests(monkeypatch)


def put(store: ObjectStore, number: int, prefix: str = "0000/") -> None:
    """As the sender puts a segment."""
    store.put(
        f"{prefix}{number:016x}.ltx",
        b"segment %d" % number,
        timestamp_ms=1_736_000_000_000 + number,
        metadata={"walship-sha256": DIGEST, "walship-previous": f"{number:064x}"},
        if_absent=True,
    )


ACTIONS: dict[str, Callable[[ObjectStore, str], Any]] = {
    "put": lambda store, key: store.put(key, key.encode(), if_absent=True),
    "replace": lambda store, key: store.put(key, key.encode(), if_match="1"),
    "get": lambda store, key: store.get(key),
    "get a range": lambda store, key: store.get(key, 2, 5),
    "head": lambda store, key: store.head(key),
    "read": lambda store, key: store.read(key),
    "read what is new": lambda store, key: store.read(key, unless_etag="1"),
}


def outcome(store: ObjectStore, action: str, key: str) -> object:
    """What an action returned, or all that its error says."""
    try:
        found = ACTIONS[action](store, key)
    except StoreError as error:
        return type(error), str(error), error.code, error.retryable, error.ambiguous
    # The time of the answer: every second another one.
    if isinstance(found, Version):
        return replace(found, now_ms=0)
    return replace(found, modified_ms=0) if action in ("put", "replace") else found


def settings_of_each_kind() -> dict[str, tuple[str, dict[str, str], dict[str, object]]]:
    """Parameters of a URL, environment and further settings that change requests."""
    token = {**KEYS, "AWS_SESSION_TOKEN": "a/token+="}
    return {
        "plain": ("", KEYS, {}),
        "host style": ("&force-path-style=false", KEYS, {}),
        "region": ("&region=eu-west-3", KEYS, {}),
        "storage class": ("&storage-class=STANDARD_IA", KEYS, {}),
        "SSE-KMS": ("&sseKmsKeyId=alias/k", KEYS, {}),
        "session token": ("", token, {}),
        "Tigris header": ("&tigris-consistent=true", KEYS, {}),
        "unsigned": ("&sign-payload=false", KEYS, {}),
    }


SETTINGS = settings_of_each_kind()


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_same_at_the_wire(endpoint: RecordingEndpoint, short: list[str], kind: str) -> None:
    """Whatever the settings, the third request of a kind has every header that boto3 gave the
    second, and the signature that botocore works out for it."""
    parameters, environ, more = SETTINGS[kind]
    url = f"s3://bucket/a path/ü?endpoint=http://s3.test:{endpoint.port}{parameters}"
    with opened(url, environ, **more) as store:
        for number in range(1, 4):
            put(store, number)
            store.get(f"0000/{number:016x}.ltx", 0, 5)
            store.head(f"0000/{number:016x}.ltx")
    assert short == ["PutObject", "GetObject", "HeadObject"]
    for method in ("PUT", "GET", "HEAD"):
        _, whole, lean = (r for r in endpoint.requests if r.method == method)
        numbered = {"x-amz-meta-walship-previous", "x-amz-meta-litestream-timestamp"}
        expected, found = constant(whole), constant(lean)
        assert found.keys() == expected.keys()
        assert {k: v for k, v in found.items() if k not in numbered} == {
            k: v for k, v in expected.items() if k not in numbered
        }
        assert lean.headers["authorization"] == authorization(lean, "tsec_y", scheme="http")
        assert lean.path == whole.path.replace("2.ltx", "3.ltx")
        assert lean.headers["amz-sdk-invocation-id"] != whole.headers["amz-sdk-invocation-id"]
    assert lean.headers.get("x-tigris-consistent") == ("true" if kind == "Tigris header" else None)
    content, kept = next(v for k, v in endpoint.objects.items() if k.endswith("3.ltx"))
    assert content == b"segment 3"
    assert kept["x-amz-meta-walship-previous"] == f"{3:064x}"
    assert kept["x-amz-meta-litestream-timestamp"] == "2025-01-04T14:13:20.003Z"


FOUND = {"ETag": '"1"', "Last-Modified": "Mon, 06 Jan 2025 10:00:00 GMT"}
ANSWERS = {
    "as usual": None,
    "an answer without a tag": Answer(200, b"", {}),
    "a page of somebody else": Answer(200, b"<html>log in</html>", {"Content-Type": "text/html"}),
    "an error inside": Answer(
        200, b"<Error><Code>SlowDown</Code><Message>m</Message></Error>", dict(FOUND)
    ),
    "a time that is none": Answer(200, b"0123456789", {"ETag": '"1"', "Last-Modified": "soon"}),
    "everything instead of a range": Answer(200, b"0123456789", dict(FOUND)),
    "another range": Answer(206, b"01234", {**FOUND, "Content-Range": "bytes 0-4/10"}),
    "nothing changed": Answer(304, b"", dict(FOUND)),
    "no connection": Answer(drop=True),
    "an error that is no XML": Answer(502, b"<html>bad gateway"),
    **{
        f"{status} {code}": error_answer(status, code, "line one\nline two")
        for status, code in [
            (400, "ExpiredToken"),
            (400, "InvalidRequest"),
            (400, "RequestTimeout"),
            (401, "Unauthorized"),
            (403, "AccessDenied"),
            (403, "RequestTimeTooSkewed"),
            (403, "SignatureDoesNotMatch"),
            (404, "NoSuchBucket"),
            (404, "NoSuchKey"),
            (408, "RequestCanceled"),
            (409, "ConditionalRequestConflict"),
            (412, "PreconditionFailed"),
            (416, "InvalidRange"),
            (429, "TooManyRequests"),
            (500, "InternalError"),
            (501, "NotImplemented"),
            (503, "SlowDown"),
        ]
    },
}


@pytest.mark.parametrize("action", ACTIONS)
def test_the_same_outcome(endpoint: RecordingEndpoint, short: list[str], action: str) -> None:
    """Whatever the store answers, the short way ends as boto3's way does, word for word, after as
    many requests."""
    url = f"s3://b/p?endpoint={endpoint.url}&read-timeout=2s"
    key = "0000/it"

    def answering(answer: Answer | None, store: ObjectStore) -> tuple[object, int]:
        endpoint.objects = {"b/p/0000/it": (b"0123456789", {"x-amz-meta-Walship-X": "y"})}
        if action in ("put", "replace"):
            endpoint.objects.clear()
        endpoint.requests.clear()
        endpoint.answer = None if answer is None else lambda request: answer
        return outcome(store, action, key), len(endpoint.requests)

    def teach(store: ObjectStore) -> None:
        usual = Answer(200, b"" if action in ("put", "replace") else b"0123456789", {**FOUND})
        endpoint.answer = lambda request: usual
        for number in range(3):
            ACTIONS[action](store, f"0000/{number}")

    with opened(url) as untaught, opened(url) as taught:
        for name, answer in ANSWERS.items():
            expected = answering(answer, untaught)
            untaught._connection.client._proven.clear()  # type: ignore[attr-defined]
            untaught._connection.client._first.clear()  # type: ignore[attr-defined]
            teach(taught)
            short.clear()
            found, n_requests = answering(answer, taught)
            # An answer that may mean another region is boto3's business from its first request on.
            again = action == "head" and name.startswith("400")
            assert (found, n_requests - again) == expected, name
            assert short, name


def test_a_bucket_that_moves(endpoint: RecordingEndpoint, short: list[str]) -> None:
    """When a bucket is elsewhere by now boto3 finds it, and from then on the short way leads
    there."""

    def moved(request: Request) -> Answer | None:
        if request.signing_region == "eu-central-1":
            return None
        body = b"<Error><Code>PermanentRedirect</Code><Message>elsewhere</Message></Error>"
        return Answer(301, body, {"x-amz-bucket-region": "eu-central-1"})

    with opened("s3://bucket/app?region=us-east-1&endpoint=" + endpoint.url) as store:
        for number in range(3):
            put(store, number)
        assert short == ["PutObject"]
        endpoint.requests.clear()
        endpoint.answer = moved
        for number in range(3, 8):
            put(store, number)
    # Two are needed to learn from, and the one that is sent on is not like those that go there.
    assert short == ["PutObject"] * 4
    regions = [r.signing_region for r in endpoint.requests if r.method == "PUT"]
    assert regions[-4:] == ["eu-central-1"] * 4
    assert endpoint.requests[-1].headers["authorization"] == authorization(
        endpoint.requests[-1], "tsec_y", scheme="http"
    )
    assert len(endpoint.objects) == 8


def test_keys_that_change(
    endpoint: RecordingEndpoint, short: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request is signed with the keys as they are then; a session token comes and goes with
    them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "first")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-1")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    changes = [("first", "secret-1", None), ("second", "secret-2", None), ("third", "s3", "token")]
    with opened(f"s3://b/p?endpoint={endpoint.url}", {}) as store:
        credentials = store._connection.credentials  # type: ignore[attr-defined]
        for step, (key, secret, token) in enumerate(changes):
            credentials.access_key, credentials.secret_key = key, secret
            credentials.token = token
            for number in range(4):
                put(store, 10 * step + number)
                last = endpoint.last("PUT")
                assert f"Credential={key}/" in last.headers["authorization"]
                assert last.headers.get("x-amz-security-token") == token
                assert last.headers["authorization"] == authorization(last, secret, scheme="http")
    assert len(short) == 2 + 4 + 2


def test_only_what_was_proven(endpoint: RecordingEndpoint, short: list[str]) -> None:
    """Where a header follows from the body in a way that is not known here, or boto3 signs in
    another way, nothing goes the short way."""
    with opened(f"s3://b/p?endpoint={endpoint.url}") as store:
        client: Any = store._connection.client  # type: ignore[attr-defined]

        def checksum(params: dict[str, Any], **_: object) -> None:
            params["headers"]["x-amz-checksum-crc32"] = str(hash(params["body"].read()))
            params["body"].seek(0)

        client.meta.events.register("before-call.s3.PutObject", checksum)
        for number in range(5):
            put(store, number)
    assert not short


def test_files_are_left_to_boto3(
    endpoint: RecordingEndpoint, short: list[str], tmp_path: Path
) -> None:
    """A body that is a file is read as it is sent, which the short way does not do."""
    with opened(f"s3://b/p?endpoint={endpoint.url}") as store:
        for number in range(4):
            file = tmp_path / str(number)
            file.write_bytes(b"%d" % number)
            store.put(f"0000/{number}", file)
    assert not short


def test_what_is_sent_is_told(endpoint: RecordingEndpoint, short: list[str]) -> None:
    """The short way counts its requests as boto3's are counted."""
    told: list[str] = []
    settings = parse_replica(f"s3://b/p?endpoint={endpoint.url}", environ=KEYS).store
    store = open_store(settings, FakeClock(), told.append)
    for number in range(4):
        put(store, number)
    store.close()
    assert short == ["PutObject"] * 2
    assert told == ["PutObject"] * 4
