"""S3 requests that are made over and over, without what boto3 works out anew for each.

Nearly all that boto3 does for a request comes to the same thing every time: the endpoint, the
style, the headers that settings ask for.  So the whole of it is taken from requests that boto3
made, and only what differs is put in: key, body, metadata, conditions, range, date, signature.

That is done only where it is proven to be the same.  From one request a `Template` is made; what it
makes of the arguments of another one must be that other one, as boto3 sent it, to the last byte of
the signature.  Where it is not (signatures of another kind, checksums of bodies, a future SDK),
where the body is a file, and for every other operation, all is left to boto3; so is an answer that
sends us to another region.

Connections, proxies, certificates, time-outs, keys and the reading of answers are botocore's in
either case.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

from botocore.awsrequest import AWSPreparedRequest
from botocore.endpoint import convert_to_response_dict
from botocore.exceptions import ClientError

from walship.replica.clock import SystemClock

if TYPE_CHECKING:
    from botocore.awsrequest import AWSResponse
    from botocore.credentials import Credentials, ReadOnlyCredentials
    from botocore.parsers import ResponseParser
    from mypy_boto3_s3.client import S3Client

__all__ = ["LeanClient", "Template"]

_log = logging.getLogger(__name__)

#: Arguments of boto3 that become a header of their own, and differ from request to request.
_HEADERS: Final = {"IfMatch": "if-match", "IfNoneMatch": "if-none-match", "Range": "range"}
#: Headers that are made for each request; besides those that the arguments become.
_MADE: Final = frozenset(
    {"amz-sdk-invocation-id", "content-length", "x-amz-date", "x-amz-security-token"}
)
_UNSIGNED: Final = "UNSIGNED-PAYLOAD"
_AUTHORIZATION: Final = re.compile(
    r"AWS4-HMAC-SHA256 Credential=[^,]+/\d{8}/([^/,]+)/s3/aws4_request, "
    r"SignedHeaders=([^,]+), Signature=[0-9a-f]{64}"
)
#: The store compares the time of a signature with its own, whatever clock the engine has.
_wall_clock: Final = SystemClock()


class _Call(NamedTuple):
    """What differs from one request of a kind to the next.

    Attributes:
        name: of the object, as it is in the bucket.
        headers: those that arguments of this call became; lower-case names.
        body: its content.
    """

    name: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Template:
    """One kind of request, with everything that stays the same.

    Attributes:
        url: without the object's name, which ends it.
        host, path: of it, as the signature has them.
        headers: those that stay the same; lower-case names.
        signed: names of the headers that the signature covers, in its order.
        region: in the scope of the signature.
        is_body_signed: whether the signature covers the body.
        has_token: whether keys come with a session token.
        has_body: whether it is a PUT.
        is_streamed: whether the answer has a content that is read in pieces.
    """

    method: str
    url: str
    host: str
    path: str
    headers: Mapping[str, str]
    signed: tuple[str, ...]
    region: str
    is_body_signed: bool
    has_token: bool
    has_body: bool
    is_streamed: bool

    @classmethod
    def of(cls, request: AWSPreparedRequest, call: _Call) -> Template | None:
        """Made from a request of boto3's for this call; None if it is not like those known here."""
        headers = _plain(request.headers)
        found = _AUTHORIZATION.fullmatch(headers.pop("authorization", ""))
        name = _quoted(call.name)
        if found is None or not name or not request.url.endswith(name):
            return None
        content = headers.pop("x-amz-content-sha256", "")
        url = request.url.removesuffix(name)
        parts = urlsplit(url)
        default_port = ":443" if parts.scheme == "https" else ":80"
        return cls(
            request.method,
            url,
            parts.netloc.lower().removesuffix(default_port),
            parts.path,
            {
                header: value
                for header, value in headers.items()
                if header not in _MADE and header not in call.headers
            },
            tuple(found[2].split(";")),
            found[1],
            content != _UNSIGNED,
            "x-amz-security-token" in headers,
            "content-length" in headers,
            request.stream_output,
        )

    def make(
        self, call: _Call, keys: ReadOnlyCredentials, date: str, signing_key: bytes
    ) -> AWSPreparedRequest:
        """The request for a call.

        Args:
            date: as in ``X-Amz-Date``.
            signing_key: of these keys for that day and the template's region.
        """
        name = _quoted(call.name)
        digest = hashlib.sha256(call.body).hexdigest() if self.is_body_signed else _UNSIGNED
        headers = {
            **self.headers,
            **call.headers,
            "x-amz-date": date,
            "x-amz-content-sha256": digest,
        }
        if self.has_token:
            headers["x-amz-security-token"] = keys.token or ""
        signed = {"host": self.host, **headers}
        canonical = "\n".join(
            (
                self.method,
                self.path + name,
                "",
                *[f"{header}:{' '.join(signed[header].split())}" for header in self.signed],
                "",
                ";".join(self.signed),
                digest,
            )
        )
        scope = f"{date[:8]}/{self.region}/s3/aws4_request"
        to_sign = "\n".join(
            ("AWS4-HMAC-SHA256", date, scope, hashlib.sha256(canonical.encode()).hexdigest())
        )
        signature = hmac.digest(signing_key, to_sign.encode(), "sha256").hex()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, "
            f"SignedHeaders={';'.join(self.signed)}, Signature={signature}"
        )
        headers["amz-sdk-invocation-id"] = str(uuid.uuid4())
        if self.has_body:
            headers["content-length"] = str(len(call.body))
        body = call.body if self.has_body else None
        return AWSPreparedRequest(
            self.method, self.url + name, cast("Any", headers), body, self.is_streamed
        )


class LeanClient:
    """An S3 client: boto3's, with a short way to put, get and ask for one object.

    Thread-safe, as boto3's clients are; answers and errors are the same.

    Args:
        credentials: what the client signs with; None where there is nothing.
        parser: of answers.
        sent: called with the name of each request that goes the short way.
    """

    def __init__(
        self,
        client: S3Client,
        credentials: Credentials | None,
        parser: ResponseParser,
        sent: Callable[[str], None] | None = None,
    ) -> None:
        self._client = client
        self._credentials = credentials
        self._tell = sent
        # Shared, so that connections are.  Without it (it is not public) all is left to boto3.
        self._session: Any = getattr(getattr(client, "_endpoint", None), "http_session", None)
        self._parser = parser
        # By the kind of request; entries are replaced as a whole.
        self._proven: dict[object, Template] = {}
        self._first: dict[object, _Lesson] = {}
        self._signing_key: tuple[object, bytes] = (None, b"")
        # The request that this thread has sent last.
        self._seen = threading.local()
        for operation in ("PutObject", "GetObject", "HeadObject"):
            client.meta.events.register_last(f"before-send.s3.{operation}", self._note)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def put_object(self, **arguments: Any) -> Any:
        """As boto3's; the answer has what every store says: a tag, and its time."""
        return self._request("PutObject", self._client.put_object, arguments)

    def get_object(self, **arguments: Any) -> Any:
        """As boto3's."""
        return self._request("GetObject", self._client.get_object, arguments)

    def head_object(self, **arguments: Any) -> Any:
        """As boto3's."""
        return self._request("HeadObject", self._client.head_object, arguments)

    def _request(self, operation: str, whole: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        call, kind = _call_of(operation, arguments)
        if call is None or self._session is None or self._credentials is None:
            return whole(**arguments)
        template = self._proven.get(kind)
        if template is not None:
            keys = self._credentials.get_frozen_credentials()
            if bool(keys.token) == template.has_token:
                try:
                    return self._short(operation, template, call, keys)
                except ClientError as error:
                    if not _is_elsewhere(operation, error):
                        raise
            self._proven.pop(kind, None)
            self._first.pop(kind, None)
        self._seen.request = None
        try:
            answer = whole(**arguments)
            self._learn(kind, call, self._seen.request)
        finally:
            self._seen.request = None  # it holds the body
        return answer

    def _short(
        self, operation: str, template: Template, call: _Call, keys: ReadOnlyCredentials
    ) -> Any:
        date = datetime.fromtimestamp(_wall_clock.now_ms() // 1000, UTC).strftime("%Y%m%dT%H%M%SZ")
        request = template.make(call, keys, date, self._key(keys, date, template.region))
        if self._tell is not None:
            self._tell(operation)
        response = self._session.send(request)
        if operation == "PutObject" and response.status_code == 200:
            if not _holds_error(response.content):
                metadata = {"HTTPStatusCode": 200, "HTTPHeaders": response.headers}
                return {"ETag": response.headers.get("ETag"), "ResponseMetadata": metadata}
            response.status_code = 500
        return self._parsed(operation, response)

    def _parsed(self, operation: str, response: AWSResponse) -> Any:
        model = self._client.meta.service_model.operation_model(operation)
        told = convert_to_response_dict(response, model)
        parsed = self._parser.parse(told, cast("Any", model.output_shape))
        if response.status_code >= 300:
            raise ClientError(parsed, operation)
        return parsed

    def _key(self, keys: ReadOnlyCredentials, date: str, region: str) -> bytes:
        """What signs for a day: the same for all requests of that day."""
        scope = (keys.secret_key, date[:8], region)
        known, key = self._signing_key
        if known != scope:
            key = f"AWS4{keys.secret_key}".encode()
            for part in (date[:8], region, "s3", "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._signing_key = (scope, key)
        return key

    # -- learning from boto3 ------------------------------------------------------------------

    def _note(self, request: AWSPreparedRequest, **_: object) -> None:
        self._seen.request = request

    def _learn(self, kind: object, call: _Call, request: AWSPreparedRequest | None) -> None:
        """What boto3 has just sent for this call was right: one more request to go by."""
        if request is None:
            return
        try:
            self._compare(kind, call, request)
        except Exception as error:  # whatever it is, the request has succeeded
            _log.debug("request-not-learnt url=%s error=%r", request.url, error)

    def _compare(self, kind: object, call: _Call, request: AWSPreparedRequest) -> None:
        digest = hashlib.sha256(call.body).digest()
        earlier = self._first.get(kind)
        if (
            earlier is not None
            and call.name != earlier.name
            and (digest != earlier.digest or not call.body)
            and self._makes(earlier.template, call, request)
        ):
            self._proven[kind] = earlier.template
            self._first.pop(kind, None)
            _log.debug("request-learnt method=%s url=%s", request.method, earlier.template.url)
            return
        template = Template.of(request, call)
        if template is not None:
            self._first[kind] = _Lesson(template, call.name, digest)

    def _makes(self, template: Template, call: _Call, request: AWSPreparedRequest) -> bool:
        """Whether a template gives exactly what boto3 sent for this call."""
        credentials = self._credentials
        if credentials is None:
            return False
        keys = credentials.get_frozen_credentials()
        sent = _plain(request.headers)
        date = sent.get("x-amz-date", "")
        made = template.make(call, keys, date, self._key(keys, date, template.region))
        ours = dict(made.headers)
        ours["amz-sdk-invocation-id"] = sent.get("amz-sdk-invocation-id", "")
        return (made.method, made.url, ours) == (request.method, request.url, sent)


class _Lesson(NamedTuple):
    """What the first request of a kind taught; the body by its digest, for it may be large."""

    template: Template
    name: str
    digest: bytes


def _call_of(operation: str, arguments: Mapping[str, Any]) -> tuple[_Call | None, object]:
    """What differs in a call, and its kind: all that it has in common with others."""
    common = dict(arguments)
    body = common.pop("Body", b"")
    name = common.pop("Key")
    headers: dict[str, str] = {
        header: common.pop(argument) for argument, header in _HEADERS.items() if argument in common
    }
    for entry, value in common.pop("Metadata", {}).items():
        headers[f"x-amz-meta-{entry.lower()}"] = value
    if not isinstance(body, bytes) or not all(value.isascii() for value in headers.values()):
        return None, None
    return _Call(name, headers, body), (operation, frozenset(headers), frozenset(common.items()))


def _quoted(name: str) -> str:
    return quote(name, safe="/~")


def _plain(headers: Any) -> dict[str, str]:
    """Headers with lower-case names and text as values."""
    return {
        name.lower(): value.decode("latin-1") if isinstance(value, bytes) else str(value)
        for name, value in headers.items()
    }


def _holds_error(content: bytes) -> bool:
    """Whether a success to a PUT is none: boto3 looks there as well, and takes no half of it."""
    if not content:
        return False
    try:
        return ElementTree.fromstring(content).tag == "Error"
    except ElementTree.ParseError:
        return True


def _is_elsewhere(operation: str, error: ClientError) -> bool:
    """Whether boto3 would look for the bucket in another region after this answer."""
    details = error.response["Error"]
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    if details.get("Code") == "AuthorizationHeaderMalformed":
        return "Region" in details
    return (
        status in (301, 302, 307)
        or details.get("Code") in ("IllegalLocationConstraintException", "PermanentRedirect")
        # The answer to a HEAD has no body that could say why.
        or (operation == "HeadObject" and status == 400)
    )
