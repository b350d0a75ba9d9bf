"""Replica URLs, and what is known about the providers behind their endpoints.

``parse_url`` turns a URL into settings by their configuration-file names, all still text:

    s3://bucket/prefix?endpoint=...&region=...
    s3://arn:aws:s3:region:account:accesspoint/name/prefix
    s3://bucket.s3.region.amazonaws.com/prefix          and the like: see _HOST_FORMS
    file:///absolute/directory                          or a plain path

Names of parameters may be written ``part-size``, ``part_size`` or ``partSize``.  Credentials have
no place in a URL.  ``provider_of`` tells what an endpoint needs.  Basis of both: Litestream 0.5.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from walship.replica.errors import ConfigError

from .values import nearest

__all__ = [
    "UNSUPPORTED",
    "Provider",
    "clean_path",
    "is_private_host",
    "is_url",
    "normalize_endpoint",
    "parse_url",
    "provider_of",
    "region_of",
]

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

#: Parameters of an s3:// URL, by their configuration-file names.
_S3_PARAMETERS: Final = (
    "ca-bundle",
    "concurrency",
    "connect-timeout",
    "endpoint",
    "force-path-style",
    "max-connections",
    "part-size",
    "profile",
    "read-timeout",
    "region",
    "require-content-md5",
    "sign-payload",
    "skip-verify",
    "sse-customer-algorithm",
    "sse-customer-key",
    "sse-customer-key-md5",
    "sse-customer-key-path",
    "sse-kms-key-id",
    "storage-class",
    "sync-interval",
    "tigris-consistent",
)
_FILE_PARAMETERS: Final = ("sync-interval",)
_CREDENTIALS: Final = frozenset(
    {
        "accesskey",
        "accesskeyid",
        "awsaccesskeyid",
        "awssecretaccesskey",
        "awssessiontoken",
        "secret",
        "secretaccesskey",
        "secretkey",
        "sessiontoken",
        "token",
    }
)
_OR_MOUNTED: Final = "use s3:// or a directory (a mounted one, perhaps)"
#: Litestream's other types of replica, and what to do instead.
UNSUPPORTED: Final = {
    "abs": "use s3:// with another provider, or a directory (Azure can be mounted)",
    "gs": "use s3://BUCKET/PATH?endpoint=https://storage.googleapis.com with HMAC keys",
    "nats": "use s3:// or a directory",
    "oss": "use s3://BUCKET/PATH?endpoint=https://oss-REGION.aliyuncs.com&force-path-style=false",
    "sftp": _OR_MOUNTED,
    "webdav": _OR_MOUNTED,
    "webdavs": _OR_MOUNTED,
}
_NO_SCHEMES: Final = {
    **UNSUPPORTED,
    **dict.fromkeys(("http", "https"), "use s3://BUCKET/PATH?endpoint=HOST"),
}


@dataclass(frozen=True)
class _HostForm:
    """A host that holds bucket, region and endpoint at once.

    Attributes:
        pattern: groups ``bucket`` and, where there is one, ``region``.
        endpoint: template with ``{region}``, or None for AWS.
    """

    pattern: re.Pattern[str]
    endpoint: str | None


_HOST_FORMS: Final = tuple(
    _HostForm(re.compile(rf"(?P<bucket>[^:]+?)\.{pattern}"), endpoint)
    for pattern, endpoint in (
        (r"s3\.amazonaws\.com", None),
        (r"s3[.-](?P<region>[a-z0-9-]+)\.amazonaws\.com", None),
        (
            r"(?P<region>[a-z0-9-]+)\.digitaloceanspaces\.com",
            "https://{region}.digitaloceanspaces.com",
        ),
        (r"s3\.(?P<region>[a-z0-9-]+)\.backblazeb2\.com", "https://s3.{region}.backblazeb2.com"),
        (r"s3\.filebase\.com", "https://s3.filebase.com"),
        (r"s3\.(?P<region>[a-z0-9-]+)\.scw\.cloud", "https://s3.{region}.scw.cloud"),
        (r"fly\.storage\.tigris\.dev", "https://fly.storage.tigris.dev"),
        (r"t3\.storage\.dev", "https://t3.storage.dev"),
    )
)
_HOST_WITH_PORT: Final = re.compile(r"(?P<bucket>[^.:]+)\.(?P<host>[^:]+:\d+)")


def is_url(text: str) -> bool:
    """Whether ``text`` begins with a scheme (``name://``); else it is a path."""
    return _SCHEME.match(text) is not None


def parse_url(url: str) -> dict[str, str]:
    """Settings that a replica URL holds, by configuration-file name, not validated further.

    ``type`` is always there, ``bucket`` not always: ``s3:///prefix`` leaves it to ``BUCKET_NAME``.

    Raises:
        ConfigError: another scheme, an unknown parameter, credentials in the URL.
    """
    match = _SCHEME.match(url)
    if match is None:
        raise ConfigError(f"not a URL: {_shown(url)}")
    scheme = match[1].lower()
    if scheme in _NO_SCHEMES:
        raise ConfigError(f"{scheme}:// is not supported: {_NO_SCHEMES[scheme]}")
    if scheme not in ("s3", "file"):
        raise ConfigError(f"{scheme}:// is not supported: use s3://BUCKET/PATH or a directory")
    rest = url[match.end() :]
    if "#" in rest:
        raise ConfigError(f"'#' in {_shown(url)}: write %23 if it belongs to the path")
    location, _, query = rest.partition("?")
    host, slash, path = location.partition("/")
    path = _decoded(url, path)
    if scheme == "file":
        return _file_settings(url, host, slash + path, query)
    return _s3_settings(url, host, path, query)


def clean_path(path: str) -> str:
    """A key prefix without slashes at its ends, empty parts and ``.`` parts."""
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _file_settings(url: str, host: str, path: str, query: str) -> dict[str, str]:
    if host not in ("", "localhost"):
        raise ConfigError(f"{_shown(url)}: a file URL has three slashes: file:///{host}{path}")
    if path in ("", "/"):
        raise ConfigError(f"{_shown(url)}: which directory? file:///absolute/directory")
    return {"type": "file", "path": path, **_parameters(url, query, _FILE_PARAMETERS)}


def _s3_settings(url: str, host: str, path: str, query: str) -> dict[str, str]:
    if "@" in host:
        raise ConfigError(
            "credentials do not belong into a URL: use AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or the settings access-key-id and secret-access-key"
        )
    settings = {"type": "s3"}
    if host.startswith("arn:"):
        # arn:partition:s3:region:account:accesspoint/name: the name is the path's first part.
        name, _, path = path.partition("/")
        if not name or host.count(":") != 5:
            raise ConfigError(
                f"{_shown(url)}: an access point is written "
                "s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/PATH"
            )
        settings["bucket"] = f"{host}/{name}"
        if region := host.split(":")[3]:
            settings["region"] = region
    else:
        settings.update(_host_settings(_decoded(url, host)))
    if path := clean_path(path):
        settings["path"] = path
    settings.update(_parameters(url, query, _S3_PARAMETERS))
    return settings


def _host_settings(host: str) -> dict[str, str]:
    if not host:
        return {}
    for form in _HOST_FORMS:
        match = form.pattern.fullmatch(host)
        if match is not None:
            groups = match.groupdict()
            settings = {"bucket": groups["bucket"]}
            if groups.get("region"):
                settings["region"] = groups["region"]
            if form.endpoint is not None:
                settings["endpoint"] = form.endpoint.format(region=groups.get("region", ""))
            return settings
    match = _HOST_WITH_PORT.fullmatch(host)
    if match is not None:
        return {"bucket": match["bucket"], "endpoint": match["host"]}
    if ":" in host:
        raise ConfigError(f"s3://{host}: a bucket has no port; give the server as ?endpoint=")
    return {"bucket": host}


def _parameters(url: str, query: str, known: tuple[str, ...]) -> dict[str, str]:
    by_spelling = {_squashed(name): name for name in known}
    found: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        written, equals, value = part.partition("=")
        written = _decoded(url, written)
        squashed = _squashed(written)
        if squashed in _CREDENTIALS:
            raise ConfigError(
                f"{written} does not belong into a URL: use AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or the settings access-key-id and secret-access-key"
            )
        name = by_spelling.get(squashed)
        if name is None:
            raise ConfigError(f"unknown URL parameter {written!r}{nearest(written, known)}")
        if not equals:
            raise ConfigError(f"URL parameter {written} has no value")
        if name in found:
            raise ConfigError(f"URL parameter {name} is given twice")
        found[name] = _decoded(url, value)
    return found


def _squashed(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def _decoded(url: str, text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_shown(url)}: a %-escape in it is not UTF-8") from error


def _shown(url: str) -> str:
    """The URL without what might be secret in it."""
    shown = url.partition("?")[0]
    scheme, separator, rest = shown.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


# --- endpoints -----------------------------------------------------------------------------------


def normalize_endpoint(endpoint: str) -> str:
    """An endpoint with its scheme, without a slash at the end.

    Without a scheme it is https, except for this machine and private networks (localhost, names
    without a dot, ``.local`` and ``.internal`` names, private addresses), where it is http.

    Raises:
        ConfigError: not the address of a server.
    """
    text = endpoint.strip()
    if not is_url(text):
        try:
            host = urlsplit(f"//{text}").hostname or ""
        except ValueError:
            host = ""
        text = f"{'http' if is_private_host(host) else 'https'}://{text}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigError(f"endpoint: not the address of a server: {_shown(endpoint)!r}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError("endpoint: only scheme, host, port and path are expected")
    return text.rstrip("/")


def is_private_host(host: str) -> bool:
    """Whether a host name or address is this machine's or of a private network."""
    host = host.lower().rstrip(".")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return (
            "." not in host or host.endswith((".localhost", ".local", ".internal"))
        ) and host != ""
    return address.is_private or address.is_loopback or address.is_link_local


@dataclass(frozen=True)
class Provider:
    """What an endpoint needs; settings that are given explicitly win over it.

    Attributes:
        name: for people.
        region: signing region where none is given, or None for no opinion.
        require_content_md5: see ``S3Settings``.
        tigris_consistent: see ``S3Settings``.
        concurrency: see ``S3Settings``; None for the default.
    """

    name: str
    region: str | None = None
    require_content_md5: bool = True
    tigris_consistent: bool = False
    concurrency: int | None = None


def _is_tigris(host: str) -> bool:
    return host == "t3.storage.dev" or host.endswith((".tigris.dev", ".t3.storage.dev"))


_PROVIDERS: Final[tuple[tuple[Callable[[str], bool], Provider], ...]] = (
    (
        _is_tigris,
        Provider("Tigris", region="auto", require_content_md5=False, tigris_consistent=True),
    ),
    (
        # More parallel part uploads than this are refused.
        lambda host: host.endswith(".r2.cloudflarestorage.com"),
        Provider("Cloudflare R2", region="auto", concurrency=2),
    ),
    (lambda host: host.endswith(".backblazeb2.com"), Provider("Backblaze B2")),
    (lambda host: host.endswith(".digitaloceanspaces.com"), Provider("DigitalOcean Spaces")),
    (lambda host: host.endswith(".your-objectstorage.com"), Provider("Hetzner")),
    (lambda host: host.endswith(".scw.cloud"), Provider("Scaleway")),
    (lambda host: host == "s3.filebase.com", Provider("Filebase")),
    (lambda host: host == "storage.googleapis.com", Provider("Google Cloud Storage")),
    (lambda host: host.endswith(".supabase.co"), Provider("Supabase")),
    (lambda host: host.endswith(".amazonaws.com"), Provider("AWS")),
)


#: Endpoints of providers that have one per region, and name it there.
_REGION_IN_HOST: Final = re.compile(
    r"s3[.-](?P<aws>[a-z0-9-]+)\.amazonaws\.com|(?P<do>[a-z0-9-]+)\.digitaloceanspaces\.com|"
    r"s3\.(?P<b2>[a-z0-9-]+)\.backblazeb2\.com|s3\.(?P<scw>[a-z0-9-]+)\.scw\.cloud|"
    r"(?P<hetzner>[a-z0-9-]+)\.your-objectstorage\.com"
)


def region_of(endpoint: str | None) -> str | None:
    """The region that an endpoint is for, where its host name says so: no other can be right."""
    match = _REGION_IN_HOST.fullmatch(_host(endpoint)) if endpoint else None
    return match[match.lastgroup] if match is not None and match.lastgroup else None


def _host(endpoint: str) -> str:
    return (urlsplit(endpoint).hostname or "").lower().rstrip(".")


def provider_of(endpoint: str | None) -> Provider:
    """Who is behind an endpoint (None is AWS); a nameless one with the defaults if unknown."""
    if endpoint is None:
        return Provider("AWS")
    host = _host(endpoint)
    for matches, provider in _PROVIDERS:
        if matches(host):
            return provider
    return Provider("S3-compatible")
