"""Replica URLs, endpoints and providers."""

from __future__ import annotations

import pytest

from walship.replica.config.url import is_private_host, normalize_endpoint, parse_url, provider_of
from walship.replica.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket", {"bucket": "bucket"}),
        ("s3://bucket/", {"bucket": "bucket"}),
        ("s3://bucket/a/b/", {"bucket": "bucket", "path": "a/b"}),
        ("S3://bucket//a", {"bucket": "bucket", "path": "a"}),
        ("s3://bucket/a//./b", {"bucket": "bucket", "path": "a/b"}),
        ("s3://my.dotted.bucket/a", {"bucket": "my.dotted.bucket", "path": "a"}),
        ("s3:///a/b", {"path": "a/b"}),
        ("s3://bucket/a%20b%2Fc", {"bucket": "bucket", "path": "a b/c"}),
        (
            "s3://bucket?endpoint=fly.storage.tigris.dev&region=auto",
            {"bucket": "bucket", "endpoint": "fly.storage.tigris.dev", "region": "auto"},
        ),
        (
            "s3://bucket/db?endpoint=http%3A%2F%2Fminio%3A9000",
            {"bucket": "bucket", "path": "db", "endpoint": "http://minio:9000"},
        ),
        (
            "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/name/db",
            {
                "bucket": "arn:aws:s3:eu-west-1:123456789012:accesspoint/name",
                "path": "db",
                "region": "eu-west-1",
            },
        ),
        ("s3://bucket.s3.amazonaws.com/db", {"bucket": "bucket", "path": "db"}),
        (
            "s3://a.b.s3.eu-west-1.amazonaws.com/db",
            {"bucket": "a.b", "path": "db", "region": "eu-west-1"},
        ),
        (
            "s3://bucket.nyc3.digitaloceanspaces.com",
            {
                "bucket": "bucket",
                "region": "nyc3",
                "endpoint": "https://nyc3.digitaloceanspaces.com",
            },
        ),
        (
            "s3://bucket.s3.us-west-002.backblazeb2.com",
            {
                "bucket": "bucket",
                "region": "us-west-002",
                "endpoint": "https://s3.us-west-002.backblazeb2.com",
            },
        ),
        (
            "s3://bucket.s3.filebase.com",
            {"bucket": "bucket", "endpoint": "https://s3.filebase.com"},
        ),
        (
            "s3://bucket.s3.fr-par.scw.cloud",
            {"bucket": "bucket", "region": "fr-par", "endpoint": "https://s3.fr-par.scw.cloud"},
        ),
        (
            "s3://bucket.fly.storage.tigris.dev/db",
            {"bucket": "bucket", "path": "db", "endpoint": "https://fly.storage.tigris.dev"},
        ),
        ("s3://bucket.localhost:9000", {"bucket": "bucket", "endpoint": "localhost:9000"}),
        ("s3://bucket.10.0.0.1:9000", {"bucket": "bucket", "endpoint": "10.0.0.1:9000"}),
        ("file:///var/backups", {"type": "file", "path": "/var/backups"}),
        ("file://localhost/var", {"type": "file", "path": "/var"}),
        ("file:///a%20b?sync-interval=5s", {"type": "file", "path": "/a b", "sync-interval": "5s"}),
    ],
)
def test_forms(url: str, expected: dict[str, str]) -> None:
    """Every form of a replica URL gives the settings that are in it."""
    assert parse_url(url) == {"type": "s3", **expected}


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("forcePathStyle", "force-path-style"),
        ("force-path-style", "force-path-style"),
        ("force_path_style", "force-path-style"),
        ("skipVerify", "skip-verify"),
        ("signPayload", "sign-payload"),
        ("requireContentMD5", "require-content-md5"),
        ("require-content-md5", "require-content-md5"),
        ("storageClass", "storage-class"),
        ("partSize", "part-size"),
        ("part-size", "part-size"),
        ("concurrency", "concurrency"),
        ("sseCustomerAlgorithm", "sse-customer-algorithm"),
        ("sseCustomerKey", "sse-customer-key"),
        ("sseCustomerKeyMD5", "sse-customer-key-md5"),
        ("sseKmsKeyId", "sse-kms-key-id"),
        ("sse-kms-key-id", "sse-kms-key-id"),
        ("syncInterval", "sync-interval"),
    ],
)
def test_spellings_of_parameters(spelling: str, name: str) -> None:
    """A parameter may be written with hyphens, underscores or as one camelCase word."""
    assert parse_url(f"s3://b?{spelling}=x+y%2Bz") == {"type": "s3", "bucket": "b", name: "x+y+z"}


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://b?regoin=auto", "did you mean region"),
        ("s3://b?nonsense=1", "unknown URL parameter 'nonsense'"),
        ("s3://b?region", "has no value"),
        ("s3://b?region=a&region=b", "twice"),
        ("s3://key:secret@b", "credentials do not belong"),
        ("s3://b?access-key-id=AKIA", "AWS_ACCESS_KEY_ID"),
        ("s3://b?secretAccessKey=hunter2", "AWS_SECRET_ACCESS_KEY"),
        ("s3://b/a#b", "%23"),
        ("s3://b:9000/x", "endpoint="),
        ("s3://b/%ff", "UTF-8"),
        ("s3://arn:aws:s3:eu-west-1:1:accesspoint", "ARN|accesspoint/NAME"),
        ("file://relative/dir", "three slashes"),
        ("file:///", "which directory"),
        ("file:///a?region=x", "unknown URL parameter"),
        ("abs://account@container/path", "abs:// is not supported"),
        ("gs://bucket/path", "storage.googleapis.com"),
        ("sftp://host/path", "not supported"),
        ("nats://host/bucket", "not supported"),
        ("oss://bucket.oss-cn.aliyuncs.com/x", "aliyuncs.com"),
        ("webdav://host/x", "not supported"),
        ("ftp://host/x", "not supported"),
        ("https://s3.amazonaws.com/b", "s3://BUCKET"),
    ],
)
def test_refusals(url: str, says: str) -> None:
    """What cannot be used is refused in one line that says what to do, without secrets."""
    with pytest.raises(ConfigError, match=says) as caught:
        parse_url(url)
    text = str(caught.value)
    assert "\n" not in text
    assert "secret@" not in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("fly.storage.tigris.dev", "https://fly.storage.tigris.dev"),
        ("s3.example.com:9000", "https://s3.example.com:9000"),
        ("localhost:9000", "http://localhost:9000"),
        ("minio:9000", "http://minio:9000"),
        ("127.0.0.1:9000", "http://127.0.0.1:9000"),
        ("192.168.1.5", "http://192.168.1.5"),
        ("[::1]:9000", "http://[::1]:9000"),
        ("store.internal", "http://store.internal"),
        ("8.8.8.8", "https://8.8.8.8"),
        ("https://localhost:9000/", "https://localhost:9000"),
        ("http://s3.example.com", "http://s3.example.com"),
        ("https://ref.supabase.co/storage/v1/s3", "https://ref.supabase.co/storage/v1/s3"),
    ],
)
def test_endpoints(endpoint: str, expected: str) -> None:
    """Without a scheme an endpoint is https, on this machine and in private networks http."""
    assert normalize_endpoint(endpoint) == expected


@pytest.mark.parametrize(
    "endpoint",
    ["", "https://", "ftp://x", "http://u:p@host", "host:99999", "host?x=1", "http://[x"],
)
def test_endpoints_that_are_none(endpoint: str) -> None:
    """Something that is not the address of a server is a ConfigError."""
    with pytest.raises(ConfigError, match="endpoint"):
        normalize_endpoint(endpoint)


def test_private_hosts() -> None:
    """Public names and addresses are not private."""
    assert not is_private_host("example.com")
    assert not is_private_host("internal.example.com")
    assert not is_private_host("")
    assert is_private_host("10.1.2.3")
    assert is_private_host("fe80::1")


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("fly.storage.tigris.dev", "Tigris"),
        ("FLY.storage.tigris.dev:443", "Tigris"),
        ("iad.storage.tigris.dev", "Tigris"),
        ("t3.storage.dev", "Tigris"),
        ("eu.t3.storage.dev", "Tigris"),
        ("nottigris.dev", "S3-compatible"),
        ("at3.storage.dev", "S3-compatible"),
        ("acc.r2.cloudflarestorage.com", "Cloudflare R2"),
        ("s3.us-west-002.backblazeb2.com", "Backblaze B2"),
        ("nyc3.digitaloceanspaces.com", "DigitalOcean Spaces"),
        ("fsn1.your-objectstorage.com", "Hetzner"),
        ("s3.fr-par.scw.cloud", "Scaleway"),
        ("s3.filebase.com", "Filebase"),
        ("ref.supabase.co", "Supabase"),
        ("s3.eu-west-1.amazonaws.com", "AWS"),
        ("127.0.0.1:9000", "S3-compatible"),
    ],
)
def test_providers(host: str, name: str) -> None:
    """A provider is recognised by the host of its endpoint, whatever the port and case."""
    provider = provider_of(f"https://{host}")
    assert provider.name == name
    assert provider.tigris_consistent is (name == "Tigris")
    assert provider.require_content_md5 is (name != "Tigris")
    assert provider.concurrency == (2 if name == "Cloudflare R2" else None)


def test_no_endpoint_is_aws() -> None:
    """Without an endpoint the provider is AWS."""
    assert provider_of(None).name == "AWS"
