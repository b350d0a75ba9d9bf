"""What each provider is sent, by its own name: an endpoint that records plays all of them.

Host names lead to it at the socket, over TLS with a certificate for them, so that detection sees
the real names and URLs are those that people write.  `docs/providers.md` has the results.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from support.clock import FakeClock
from support.recording import (
    Answer,
    RecordingEndpoint,
    Request,
    every_server_is,
    recording_endpoint,
    self_signed,
)
from support.signing import authorization, constant
from support.wire import lean_requests
from walship.replica.config.sources import load_config, parse_replica
from walship.replica.store.base import ObjectStore
from walship.replica.store.opening import open_store
from walship.replica.store.settings import S3Settings

MIB = 1024 * 1024
KEYS = {"AWS_ACCESS_KEY_ID": "tid_x", "AWS_SECRET_ACCESS_KEY": "tsec_y"}
PAGE = Path(__file__).parents[2] / "docs" / "providers.md"


@dataclass
class Provider:
    """A provider, how people name a bucket there, and what is expected at the wire.

    Attributes:
        name: as in the documentation.
        replica: URL, or mapping.
        address: host, and path if there is one, of its endpoint.
        host: that requests go to.
        prefix: what stands before the key in their path.
        region: in the signature.
        md5: whether batch deletes have Content-MD5.
        consistent: whether each request has ``X-Tigris-Consistent``.
        parts: of one upload in flight.
        environ: variables besides the keys.
    """

    name: str
    replica: Any
    address: str
    host: str
    prefix: str
    region: str
    md5: bool = True
    consistent: bool = False
    parts: int = 5
    environ: dict[str, str] = field(default_factory=dict)


R2 = "0123456789abcdef.r2.cloudflarestorage.com"
TIGRIS = "fly.storage.tigris.dev"
SUPABASE = "abcdefghij.supabase.co"
B2 = "s3.eu-central-003.backblazeb2.com"

PROVIDERS = [
    Provider(
        "AWS",
        "s3://bucket/app?region=eu-central-1",
        "s3.eu-central-1.amazonaws.com",
        "bucket.s3.eu-central-1.amazonaws.com",
        "",
        "eu-central-1",
    ),
    Provider(
        "AWS, a bucket with a dot",
        "s3://my.bucket/app?region=eu-central-1",
        "s3.eu-central-1.amazonaws.com",
        "s3.eu-central-1.amazonaws.com",
        "/my.bucket",
        "eu-central-1",
    ),
    Provider(
        "AWS, an access point",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/point/app",
        "s3.eu-west-1.amazonaws.com",
        "point-123456789012.s3-accesspoint.eu-west-1.amazonaws.com",
        "",
        "eu-west-1",
    ),
    Provider(
        "Tigris",
        f"s3://bucket/app?endpoint={TIGRIS}&region=auto",
        TIGRIS,
        TIGRIS,
        "/bucket",
        "auto",
        md5=False,
        consistent=True,
    ),
    Provider(
        "Tigris, by Fly's variables",
        "s3:///app",
        TIGRIS,
        TIGRIS,
        "/bucket",
        "auto",
        md5=False,
        consistent=True,
        environ={
            "AWS_ENDPOINT_URL_S3": f"https://{TIGRIS}",
            "AWS_REGION": "auto",
            "BUCKET_NAME": "bucket",
        },
    ),
    Provider(
        "Tigris, outside Fly",
        "s3://bucket/app?endpoint=t3.storage.dev",
        "t3.storage.dev",
        "t3.storage.dev",
        "/bucket",
        "auto",
        md5=False,
        consistent=True,
    ),
    Provider("Cloudflare R2", f"s3://bucket/app?endpoint={R2}", R2, R2, "/bucket", "auto", parts=2),
    Provider("Backblaze B2", f"s3://bucket/app?endpoint={B2}", B2, B2, "/bucket", "eu-central-003"),
    Provider("Backblaze B2, by host", f"s3://bucket.{B2}/app", B2, B2, "/bucket", "eu-central-003"),
    Provider(
        "DigitalOcean Spaces",
        "s3://bucket/app?endpoint=fra1.digitaloceanspaces.com",
        "fra1.digitaloceanspaces.com",
        "fra1.digitaloceanspaces.com",
        "/bucket",
        "fra1",
    ),
    Provider(
        "DigitalOcean Spaces, host style",
        "s3://bucket.fra1.digitaloceanspaces.com/app?force-path-style=false",
        "fra1.digitaloceanspaces.com",
        "bucket.fra1.digitaloceanspaces.com",
        "",
        "fra1",
    ),
    Provider(
        "Hetzner",
        "s3://bucket/app?endpoint=fsn1.your-objectstorage.com",
        "fsn1.your-objectstorage.com",
        "fsn1.your-objectstorage.com",
        "/bucket",
        "fsn1",
    ),
    Provider(
        "Scaleway",
        "s3://bucket/app?endpoint=s3.fr-par.scw.cloud",
        "s3.fr-par.scw.cloud",
        "s3.fr-par.scw.cloud",
        "/bucket",
        "fr-par",
    ),
    Provider(
        "Filebase",
        "s3://bucket/app?endpoint=s3.filebase.com",
        "s3.filebase.com",
        "s3.filebase.com",
        "/bucket",
        "us-east-1",
    ),
    Provider(
        "Supabase",
        f"s3://bucket/app?endpoint=https://{SUPABASE}/storage/v1/s3&region=eu-west-2",
        f"{SUPABASE}/storage/v1/s3",
        SUPABASE,
        "/storage/v1/s3/bucket",
        "eu-west-2",
    ),
    Provider(
        "Google Cloud Storage",
        "s3://bucket/app?endpoint=https://storage.googleapis.com&region=auto",
        "storage.googleapis.com",
        "storage.googleapis.com",
        "/bucket",
        "auto",
    ),
    Provider(
        "MinIO",
        "s3://bucket/app?endpoint=https://minio.example.com:9000",
        "minio.example.com",
        "minio.example.com:9000",
        "/bucket",
        "us-east-1",
    ),
    Provider(
        "SeaweedFS",
        "s3://bucket/app?endpoint=https://seaweedfs.example.com:8333",
        "seaweedfs.example.com",
        "seaweedfs.example.com:8333",
        "/bucket",
        "us-east-1",
    ),
    Provider(
        "Alibaba OSS",
        "s3://bucket/app?endpoint=oss-eu-central-1.aliyuncs.com&force-path-style=false"
        "&region=oss-eu-central-1",
        "oss-eu-central-1.aliyuncs.com",
        "bucket.oss-eu-central-1.aliyuncs.com",
        "",
        "oss-eu-central-1",
    ),
    Provider(
        "any other",
        "s3://bucket/app?endpoint=s3.example.com",
        "s3.example.com",
        "s3.example.com",
        "/bucket",
        "us-east-1",
    ),
]
#: Those that other tests run against, whole servers.
LIVE = {"MinIO", "SeaweedFS"}
IDS = [provider.name for provider in PROVIDERS]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for all of them."""
    hosts = sorted({provider.host.partition(":")[0] for provider in PROVIDERS})
    return self_signed(tmp_path_factory.mktemp("tls"), *hosts, "bucket.s3.amazonaws.com")


@pytest.fixture
def endpoint(certificate: Path) -> Iterator[RecordingEndpoint]:
    """A recording endpoint that every server is."""
    with recording_endpoint(certificate) as running, every_server_is(running.port):
        yield running


def replica_settings(provider: Provider, certificate: Path) -> S3Settings:
    """The settings that a replica there has."""
    environ = {**KEYS, **provider.environ, "AWS_CA_BUNDLE": str(certificate)}
    store = parse_replica(provider.replica, environ=environ).store
    assert isinstance(store, S3Settings)
    return store


def exercise(store: ObjectStore) -> None:
    """One request of every kind."""
    store.put("0000/a.ltx", b"content", timestamp_ms=1_736_000_000_120, if_absent=True)
    assert store.get("0000/a.ltx", 1, 3) == b"ont"
    assert store.head("0000/a.ltx").size_bytes == 7
    assert [info.key for info in store.list("0000/")] == ["0000/a.ltx"]
    version = store.read("0000/a.ltx")
    assert version is not None
    store.put("0000/a.ltx", b"other", if_match=version.etag)
    store.put("0009/big.ltx", bytes(6 * MIB))
    store.delete(["0000/a.ltx"])
    assert list(store.list("0000/")) == []


@pytest.mark.parametrize("provider", PROVIDERS, ids=IDS)
def test_every_request_to_a_provider(
    provider: Provider, endpoint: RecordingEndpoint, certificate: Path
) -> None:
    """Host, style, region, signature, checksums: of writes, reads, listings, parts and deletes."""
    endpoint.address = provider.address
    settings = replica_settings(provider, certificate)
    with contextlib.closing(open_store(settings, FakeClock())) as store:
        exercise(store)
    assert {request.method for request in endpoint.requests} == {"PUT", "GET", "HEAD", "POST"}
    for request in endpoint.requests:
        check(request, provider)
    assert settings.concurrency == provider.parts


@pytest.mark.parametrize("sse", [False, True], ids=["plain", "SSE-C"])
@pytest.mark.parametrize("provider", PROVIDERS, ids=IDS)
def test_the_short_way_to_a_provider(
    provider: Provider,
    sse: bool,
    endpoint: RecordingEndpoint,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What goes without boto3 is what boto3 sends, with the signature that botocore works out."""
    short = lean_requests(monkeypatch)
    endpoint.address = provider.address
    settings = replica_settings(provider, certificate)
    if sse:
        settings = replace(settings, sse_customer_key=bytes(range(32)), storage_class="STANDARD_IA")
    with contextlib.closing(open_store(settings, FakeClock())) as store:
        for number in range(3):
            key = f"0000/{number}.ltx"
            store.put(key, key.encode(), timestamp_ms=1_736_000_000_120, if_absent=True)
            assert store.get(key, 1, 3) == key.encode()[1:4]
            assert store.head(key).size_bytes == len(key)
    assert short == ["PutObject", "GetObject", "HeadObject"]
    for method in ("PUT", "GET", "HEAD"):
        *_, whole, lean = (request for request in endpoint.requests if request.method == method)
        check(lean, provider)
        assert lean.path == whole.path.replace("1.ltx", "2.ltx")
        assert constant(lean) == constant(whole)
        assert lean.headers["authorization"] == authorization(lean, KEYS["AWS_SECRET_ACCESS_KEY"])


def check(request: Request, provider: Provider) -> None:
    """One request is as this provider wants it."""
    headers = request.headers
    assert headers["host"] == provider.host
    of_bucket = request.method == "POST" and "delete" in request.query
    if of_bucket or "list-type" in request.query:
        assert request.path == (provider.prefix or "/")
    else:
        assert request.path.startswith(f"{provider.prefix}/app/000")
    assert request.signing_region == provider.region
    assert headers["x-amz-content-sha256"] == hashlib.sha256(request.body).hexdigest(), "signed"
    assert headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=tid_x/")
    assert ("content-md5" in headers) == (of_bucket and provider.md5)
    consistent = headers.get("x-tigris-consistent") == "true"
    assert consistent == provider.consistent
    assert consistent == ("x-tigris-consistent" in request.signed_headers)
    # The protocol wants a checksum of a batch delete, and of nothing else.
    checksums = [name for name in headers if name.startswith("x-amz-checksum")]
    assert checksums == (["x-amz-checksum-crc32"] if of_bucket else [])
    assert "aws-chunked" not in headers.get("content-encoding", "")
    assert "transfer-encoding" not in headers
    assert "x-amz-trailer" not in headers
    # Google's front end changes it on the way.
    assert "accept-encoding" not in request.signed_headers
    if request.method == "PUT":
        assert int(headers["content-length"]) == len(request.body)


def test_the_page_says_what_was_seen() -> None:
    """docs/providers.md has a row for each provider, with what this file expects of it."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and not cells[0].startswith("-"):
            rows[cells[0]] = cells[1:]
    del rows["provider"]
    assert list(rows) == IDS
    for provider in PROVIDERS:
        replica, host, region, md5, parts, tried = rows[provider.name]
        assert replica == f"`{provider.replica}`"
        assert host == f"`{provider.host}{provider.prefix}`"
        assert region == f"`{provider.region}`"
        assert (md5, parts) == ("yes" if provider.md5 else "no", str(provider.parts))
        assert tried == ("live, wire" if provider.name in LIVE else "wire")


def test_the_other_region_is_found_out(endpoint: RecordingEndpoint, certificate: Path) -> None:
    """At AWS a bucket's region need not be known: the answer to a wrong one names it."""
    environ = {**KEYS, "AWS_CA_BUNDLE": str(certificate)}

    def moved(request: Request) -> Answer | None:
        if request.signing_region == "eu-central-1":
            return None
        body = b"<Error><Code>PermanentRedirect</Code><Message>elsewhere</Message></Error>"
        return Answer(301, body, {"x-amz-bucket-region": "eu-central-1"})

    endpoint.address, endpoint.answer = "s3.eu-central-1.amazonaws.com", moved
    settings = parse_replica("s3://bucket/app", environ=environ).store
    with contextlib.closing(open_store(settings, FakeClock())) as store:
        store.put("0000/a", b"x", if_absent=True)
    hosts = [request.headers["host"] for request in endpoint.requests]
    assert hosts == ["bucket.s3.amazonaws.com", "bucket.s3.eu-central-1.amazonaws.com"]


GUIDE = {
    "a URL": """
access-key-id: tid_x
secret-access-key: tsec_y

dbs:
  - path: /path/to/local/db
    replica:
      url: s3://bucket/app?endpoint=fly.storage.tigris.dev&region=auto
""",
    "fields": """
dbs:
  - path: /path/to/local/db
    replica:
      type: s3
      bucket: bucket
      path:   app
      endpoint: fly.storage.tigris.dev
      region: auto
      access-key-id: tid_x
      secret-access-key: tsec_y
""",
    "manual override": """
access-key-id: tid_x
secret-access-key: tsec_y
dbs:
  - path: /path/to/local/db
    replica:
      type: s3
      bucket: bucket
      path:   app
      endpoint: fly.storage.tigris.dev
      region: auto
      sign-payload: true
      require-content-md5: false
""",
    "injected by Fly": """
dbs:
  - path: /data/myapp.db
    replica:
      url: s3://${BUCKET_NAME}/app?endpoint=fly.storage.tigris.dev&region=auto
""",
    "Litestream's variables": """
dbs:
  - path: /data/myapp.db
    replica:
      url: s3://bucket/app?endpoint=fly.storage.tigris.dev&region=auto
""",
}


@pytest.mark.parametrize("form", GUIDE)
def test_the_guides_forms_are_the_same_at_the_wire(
    form: str, endpoint: RecordingEndpoint, certificate: Path, tmp_path: Path
) -> None:
    """Each way of the guide to name the bucket and the keys leads to the same requests."""
    environ = {"AWS_CA_BUNDLE": str(certificate)}
    if form == "injected by Fly":
        environ |= {
            **KEYS,
            "AWS_ENDPOINT_URL_S3": "https://fly.storage.tigris.dev",
            "AWS_REGION": "auto",
            "BUCKET_NAME": "bucket",
        }
    if form == "Litestream's variables":
        environ |= {name.replace("AWS_", "LITESTREAM_"): value for name, value in KEYS.items()}
    file = tmp_path / "litestream.yml"
    file.write_text(GUIDE[form])
    (database,) = load_config(file, environ=environ).databases
    assert database.replica is not None
    endpoint.address = TIGRIS
    with contextlib.closing(open_store(database.replica.store, FakeClock())) as store:
        exercise(store)
    tigris = next(provider for provider in PROVIDERS if provider.name == "Tigris")
    for request in endpoint.requests:
        check(request, tigris)


@pytest.mark.parametrize(
    ("setting", "headers"),
    [
        ("sign-payload: false", {"x-amz-content-sha256": r"UNSIGNED-PAYLOAD"}),
        ("require-content-md5: true", {"content-md5": r".+=="}),
        ("tigris-consistent: false", {"x-tigris-consistent": None}),
        ("region: eu", {"authorization": r".*/eu/s3/aws4_request.*"}),
    ],
)
def test_what_is_detected_can_be_overridden(
    setting: str,
    headers: dict[str, str | None],
    endpoint: RecordingEndpoint,
    certificate: Path,
    tmp_path: Path,
) -> None:
    """A setting in the file wins over what the endpoint's name says."""
    file = tmp_path / "litestream.yml"
    text = GUIDE["fields"].replace("      region: auto\n", "")
    file.write_text(f"{text}      {setting}\n")
    (database,) = load_config(file, environ={"AWS_CA_BUNDLE": str(certificate)}).databases
    assert database.replica is not None
    endpoint.address = TIGRIS
    with contextlib.closing(open_store(database.replica.store, FakeClock())) as store:
        store.delete(["0000/a.ltx"])
    (request,) = endpoint.requests
    for name, pattern in headers.items():
        value = request.headers.get(name)
        assert value == pattern if pattern is None else re.fullmatch(pattern, str(value))
