"""What botocore would sign a recorded request with, worked out from the request alone."""

from __future__ import annotations

from datetime import UTC, datetime
from unittest import mock
from urllib.parse import quote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials

from support.recording import Request

#: Headers that differ between two requests of the same kind, besides those of its arguments.
OF_EACH_REQUEST = frozenset(
    {
        "amz-sdk-invocation-id",
        "authorization",
        "content-length",
        "x-amz-content-sha256",
        "x-amz-date",
    }
)


def authorization(request: Request, secret: str, *, scheme: str = "https") -> str:
    """The Authorization header that botocore gives a request with this content, at its time."""
    key = request.headers["authorization"].partition("Credential=")[2].partition("/")[0]
    covered = request.signed_headers - {"host", "x-amz-date", "x-amz-content-sha256"}
    made = AWSRequest(
        method=request.method,
        url=f"{scheme}://{request.headers['host']}{quote(request.path, safe='/~%')}",
        headers={name: value for name, value in request.headers.items() if name in covered},
        data=request.body,
    )
    signs_body = request.headers["x-amz-content-sha256"] != "UNSIGNED-PAYLOAD"
    made.context["client_config"] = Config(s3={"payload_signing_enabled": signs_body})
    token = request.headers.get("x-amz-security-token")
    now = datetime.strptime(request.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    signer = S3SigV4Auth(Credentials(key, secret, token), "s3", request.signing_region)
    with mock.patch("botocore.auth.get_current_datetime", return_value=now):
        signer.add_auth(made)
    return str(made.headers["Authorization"])


def constant(request: Request) -> dict[str, str]:
    """The headers of a request that others of its kind have as well, with their values."""
    return {name: value for name, value in request.headers.items() if name not in OF_EACH_REQUEST}
