"""Objects in an S3-compatible store, through boto3; with `lean` the only module that imports it.

One request per call: the SDK's own retries are off, so that an unclear answer to a create-only
write is never repeated behind the caller's back (``retrying.RetryingStore`` repeats, and tells).
The exceptions are the parts of a multipart upload, which have no effect until the upload is
completed: each is tried a few times here rather than sending gigabytes again; the rest of a body
that broke off, asked for with the tag of its beginning; and a request that was refused because of
its keys, which is sent once more when the SDK's chain has other keys by now.

How long a request may take: ``connect_timeout_s`` for the connection, ``read_timeout_s`` for any
silence, and the content of an object must come faster than 16 KiB/s on average.  Nothing ends a
server that trickles the headers of an answer, a listing or an error document byte by byte.

Layout: ``<path>/<level as 4 hex digits>/<min>-<max>.ltx``.  A store at a bucket's top writes
``0000/...``; keys of the forms ``/0000/...`` and ``./0000/...``, which Litestream makes from URLs
without a path, are found and continued, and so is what it makes of ``path: /app`` (see
``_find_root``).
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar, cast

import boto3.session
import botocore.exceptions as boto_errors
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.parsers import DEFAULT_TIMESTAMP_PARSER, ResponseParserError
from botocore.session import get_session
from urllib3.exceptions import HTTPError

from walship.replica.clock import Clock
from walship.replica.errors import (
    ConfigError,
    ObjectNotFound,
    PreconditionFailed,
    StoreError,
    StoreUnavailable,
)

from .base import Body, ObjectInfo, Version
from .lean import LeanClient
from .settings import S3Settings
from .timestamps import TIMESTAMP_METADATA, format_timestamp

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, GetObjectOutputTypeDef

__all__ = ["S3Store"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Sends one part: client, key's name, upload, part number, range of bytes; returns its tag.
_SendPart = Callable[["S3Client", str, str, int, range], str]

_DELETE_BATCH: Final = 1000  # what one DeleteObjects takes
_MAX_PARTS: Final = 10_000  # what one multipart upload takes
_MIB: Final = 1024 * 1024
_COPY_PART_BYTES: Final = 512 * _MIB  # one request must not take longer than the time-out
_PART_PAUSES_S: Final = (0.2, 0.5, 1.0)  # before the 2nd, 3rd and 4th attempt at a part
#: What stands before the level in keys at a bucket's top: ours, and two of Litestream's.
_TOP_FORMS: Final = ("", "/", "./")

_READ_BYTES: Final = 64 * 1024  # of a body, at once
_RESUMPTIONS: Final = 4  # of one body that breaks off
_SLOWEST_BYTES_PER_S: Final = 16 * 1024
_RENEWAL_PAUSE_S: Final = 10.0  # between two looks at the SDK's chain for other keys

_RETRYABLE_STATUS: Final = frozenset({408, 409, 429, 500, 502, 503, 504, 507, 509})
_RETRYABLE_CODES: Final = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestCanceled",
        "RequestLimitExceeded",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)
#: The server says that it did not do what was asked, and that asking again makes sense.
_WITHOUT_EFFECT_CODES: Final = frozenset(
    {"BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "SlowDown"}
)
_WITH_EFFECT: Final = frozenset({"write", "replace", "delete"})
_NO_KEY_CODES: Final = frozenset({"NoSuchKey", "404", "NotFound"})
_URL_IN_QUOTES: Final = re.compile(r'URL: "(\w+://[^/"?]+)[^"]*"\.?')
_EXPIRED_CODES: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
#: Other keys may help.  An answer to HEAD has no body and tells its status only.
_KEY_CODES: Final = _EXPIRED_CODES | {
    "400",
    "401",
    "403",
    "InvalidAccessKeyId",
    "InvalidToken",
    "NoCredentialsError",
    "PartialCredentialsError",
    "SignatureDoesNotMatch",
}
_ADVICE: Final = {
    "AccessDenied": "check that the keys may list, read, write and delete there",
    "AllAccessDisabled": "check the account",
    "AuthorizationHeaderMalformed": "check `region`",
    "IllegalLocationConstraintException": "check `region` and `endpoint`",
    "InvalidAccessKeyId": "check `access-key-id` (AWS_ACCESS_KEY_ID), and that it is a key of "
    "this endpoint",
    "InvalidBucketName": "check `bucket`",
    "InvalidToken": "check `session-token` (AWS_SESSION_TOKEN)",
    "NotImplemented": "this store lacks something that is needed (create-only writes, perhaps)",
    "PermanentRedirect": "check `region` and `endpoint`: the bucket is elsewhere",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it (NTP)",
    "SignatureDoesNotMatch": "check `secret-access-key` (AWS_SECRET_ACCESS_KEY) and `region`",
}


class _UnusableAnswer(Exception):
    """A success that cannot be one: no S3 store says this; a proxy does, or a broken server."""


@dataclass(slots=True)
class _Body:
    """What has come of an object's content, from one answer or from several.

    Attributes:
        etag: of the version it belongs to.
        is_broken: the connection ended before the content did.
    """

    pieces: list[bytes] = field(default_factory=list)
    etag: str = ""
    is_broken: bool = False

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.pieces))

    def clear(self) -> None:
        self.pieces.clear()


@dataclass(frozen=True, slots=True)
class _Connection:
    """A client and the keys it signs with: None if there are none."""

    client: S3Client
    credentials: Credentials | None

    def keys(self) -> object:
        """The keys as they are now; may ask whoever gives them out."""
        return self.credentials and self.credentials.get_frozen_credentials()


class S3Store:
    """An S3-compatible bucket, or what lies below a path in it.  Thread-safe.

    Args:
        settings: see ``S3Settings``.
        clock: for pauses between attempts at a part, and how long a body may take.
        sent: called with the name of each request that goes out ("PutObject").

    Raises:
        ConfigError: settings that the SDK refuses, an unknown profile for instance.
    """

    def __init__(
        self, settings: S3Settings, clock: Clock, sent: Callable[[str], None] | None = None
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._bucket = settings.bucket
        self._lock = threading.Lock()
        self._part_slots = threading.BoundedSemaphore(max(1, settings.concurrency))
        self._forms = _root_forms(settings)
        self._root = self._forms[0] if len(self._forms) == 1 else None  # guarded by _lock
        self._sent_name = sent
        self._connection = _connect(settings, sent)  # guarded by _renewal when it changes
        # Held while keys are read again, so that requests that failed together wait for one answer;
        # nobody else ever waits for it.
        self._renewal = threading.Lock()
        self._renewed_at: float | None = None  # monotonic; guarded by _renewal
        self._read_args: dict[str, Any] = {}
        self._write_args: dict[str, Any] = {}
        if settings.sse_customer_key is not None:
            self._read_args["SSECustomerAlgorithm"] = settings.sse_customer_algorithm or "AES256"
            self._read_args["SSECustomerKey"] = settings.sse_customer_key
            self._write_args.update(self._read_args)
        if settings.sse_kms_key_id is not None:
            self._write_args["ServerSideEncryption"] = "aws:kms"
            self._write_args["SSEKMSKeyId"] = settings.sse_kms_key_id
        if settings.storage_class is not None:
            self._write_args["StorageClass"] = settings.storage_class

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    @property
    def url(self) -> str:
        url = f"s3://{self._bucket}/{self._settings.path}".removesuffix("/")
        if self._settings.endpoint is not None:
            url += f"?endpoint={self._settings.endpoint.removeprefix('https://')}"
        return url

    @property
    def logical_times(self) -> bool:
        return False

    def level_prefix(self, level: int) -> str:
        return f"{level:04x}/"

    def put(
        self,
        key: str,
        body: Body,
        *,
        timestamp_ms: int | None = None,
        metadata: Mapping[str, str] | None = None,
        if_absent: bool = False,
        if_match: str | None = None,
    ) -> ObjectInfo:
        if if_absent and if_match is not None:
            raise ValueError("if_absent and if_match exclude each other")
        condition: dict[str, Any] = {}
        if if_absent:
            condition["IfNoneMatch"] = "*"
        elif if_match is not None:
            condition["IfMatch"] = f'"{if_match}"'
        action = "write" if if_match is None else "replace"
        size = _body_size(body)
        extra: dict[str, Any] = dict(self._write_args)
        entries = dict(metadata or {})
        if timestamp_ms is not None:
            entries[TIMESTAMP_METADATA] = format_timestamp(timestamp_ms)
        if entries:
            extra["Metadata"] = entries
        if size > self._settings.part_size:

            def send(client: S3Client, name: str, upload_id: str, number: int, part: range) -> str:
                answer = client.upload_part(
                    Bucket=self._bucket,
                    Key=name,
                    UploadId=upload_id,
                    PartNumber=number,
                    Body=_part(body, part.start, len(part)),
                    **self._read_args,
                )
                etag: str = _need(answer, "ETag")
                return etag

            part_size = self._settings.part_size
            etag, date_ms = self._put_parts(action, key, size, part_size, send, extra, condition)
        else:
            etag, date_ms = self._call(
                action,
                key,
                lambda client, name: _stored(
                    client.put_object(
                        Bucket=self._bucket,
                        Key=name,
                        Body=_part(body, 0, size),
                        **extra,
                        **condition,
                    )
                ),
            )
        if date_ms is None:
            date_ms = self._clock.now_ms()
        return ObjectInfo(key, size, date_ms, etag, entries)

    def copy(self, source: str, target: str) -> ObjectInfo:
        original = self.head(source)
        extra: dict[str, Any] = dict(self._write_args)
        if self._settings.sse_customer_key is not None:
            for name, value in self._read_args.items():
                extra[f"CopySource{name}"] = value
        origin = {"Bucket": self._bucket, "Key": self._find_root() + source}
        if original.size_bytes > _COPY_PART_BYTES:
            etag, date_ms = self._copy_parts(original, origin, target)
        else:
            etag, date_ms = self._call(
                "write",
                target,
                lambda client, name: _copied(
                    client.copy_object(
                        Bucket=self._bucket,
                        Key=name,
                        CopySource=cast("Any", origin),
                        MetadataDirective="COPY",
                        **extra,
                    )
                ),
            )
        if date_ms is None:
            date_ms = self._clock.now_ms()
        return ObjectInfo(target, original.size_bytes, date_ms, etag, original.metadata)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if length is not None and length <= 0:
            self.head(key)  # a range cannot be empty
            return b""
        last = "" if length is None else start + length - 1

        body = _Body()

        def read(client: S3Client, name: str) -> bytes:
            first = start + body.n_bytes
            condition: dict[str, Any] = {"IfMatch": f'"{body.etag}"'} if body.n_bytes else {}
            answer = client.get_object(
                Bucket=self._bucket,
                Key=name,
                Range=f"bytes={first}-{last}",
                **condition,
                **self._read_args,
            )
            if answer["ResponseMetadata"]["HTTPStatusCode"] == 200 and (
                first or length is not None
            ):
                # The server sends everything: some do when the range covers it, a few always.
                body.clear()
                content = self._read_body(answer, body)
                return content[start : None if length is None else start + length]
            content = self._read_body(answer, body)
            rest = None if length is None else start + length - first
            told = answer.get("ContentRange", "")
            _check_range(told, first, rest, len(content) - (first - start))
            return content

        for attempt in range(_RESUMPTIONS + 1):
            n_before = body.n_bytes
            try:
                return self._call("read", key, read)
            except PreconditionFailed as error:
                raise self._unavailable(
                    "read", key, "it was replaced while it was read", error.code or "412"
                ) from error
            except StoreError as error:
                if error.code in ("InvalidRange", "416"):  # `start` is at or behind the end
                    return b""
                goes_on = error.retryable and body.is_broken and body.n_bytes > n_before
                if attempt == _RESUMPTIONS or not goes_on:
                    raise
                _log.debug("read-resumed key=%s at=%d error=%s", key, body.n_bytes, error)
        raise AssertionError

    def read(self, key: str, *, unless_etag: str | None = None) -> Version | None:
        condition: dict[str, Any] = {}
        if unless_etag is not None:
            condition["IfNoneMatch"] = f'"{unless_etag}"'

        def read(client: S3Client, name: str) -> Version:
            answer = client.get_object(
                Bucket=self._bucket, Key=name, **condition, **self._read_args
            )
            body = self._read_body(answer, _Body())
            now_ms = _date_ms(answer)
            if now_ms is None:
                raise _UnusableAnswer("it has no Date")
            return Version(
                body, _need_etag(answer), _epoch_ms(_need(answer, "LastModified")), now_ms
            )

        try:
            return self._call("read", key, read)
        except StoreError as error:
            if unless_etag is not None and error.code in ("304", "NotModified"):
                return None
            raise

    def head(self, key: str) -> ObjectInfo:
        def ask(client: S3Client, name: str) -> ObjectInfo:
            answer = client.head_object(Bucket=self._bucket, Key=name, **self._read_args)
            return ObjectInfo(
                key,
                _need(answer, "ContentLength"),
                _epoch_ms(_need(answer, "LastModified")),
                _etag(answer),
                {name.lower(): value for name, value in answer.get("Metadata", {}).items()},
            )

        return self._call("read", key, ask)

    def list(self, prefix: str, start_after: str | None = None) -> Iterator[ObjectInfo]:
        request: dict[str, Any] = {}
        if start_after is not None:
            request["StartAfter"] = self._find_root() + start_after
        strip = len(self._find_root())

        def page(client: S3Client, name: str) -> tuple[Sequence[ObjectInfo], str | None]:
            answer = client.list_objects_v2(Bucket=self._bucket, Prefix=name, **request)
            more = _need(answer, "IsTruncated")  # else a page of something else is an empty bucket
            found = [
                ObjectInfo(
                    _need(item, "Key")[strip:],
                    _need(item, "Size"),
                    _epoch_ms(_need(item, "LastModified")),
                    _etag(item),
                )
                for item in answer.get("Contents", ())
            ]
            return found, _need(answer, "NextContinuationToken") if more else None

        while True:
            found, token = self._call("list", prefix, page)
            yield from found
            if token is None:
                return
            request = {"ContinuationToken": token}

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), _DELETE_BATCH):
            batch = keys[start : start + _DELETE_BATCH]
            root = self._find_root()
            answer = self._call(
                "delete",
                batch[0],
                lambda client, _name, names=[root + key for key in batch]: (  # type: ignore[misc]
                    client.delete_objects(
                        Bucket=self._bucket,
                        Delete={"Objects": [{"Key": name} for name in names], "Quiet": True},
                    )
                ),
            )
            for failure in answer.get("Errors", ()):
                code = failure.get("Code", "")
                if code in ("NoSuchKey", "NoSuchVersion"):
                    continue
                raise self._refused(
                    "delete",
                    failure.get("Key", batch[0]).removeprefix(root),
                    code,
                    failure.get("Message", ""),
                    200,
                )

    def close(self) -> None:
        self._connection.client.close()

    # --- multipart --------------------------------------------------------------------------------

    def _copy_parts(
        self, original: ObjectInfo, origin: Mapping[str, str], target: str
    ) -> tuple[str, int | None]:
        """Copy an object that is too large for one request."""
        source_args = {f"CopySource{name}": value for name, value in self._read_args.items()}

        def send(client: S3Client, name: str, upload_id: str, number: int, part: range) -> str:
            answer = client.upload_part_copy(
                Bucket=self._bucket,
                Key=name,
                UploadId=upload_id,
                PartNumber=number,
                CopySource=cast("Any", origin),
                CopySourceRange=f"bytes={part.start}-{part.stop - 1}",
                **source_args,
                **self._read_args,
            )
            etag: str = _need(_need(answer, "CopyPartResult"), "ETag")
            return etag

        extra = {**self._write_args, "Metadata": dict(original.metadata)}
        return self._put_parts(
            "write", target, original.size_bytes, _COPY_PART_BYTES, send, extra, {}
        )

    def _put_parts(
        self,
        action: str,
        key: str,
        size: int,
        part_size: int,
        send: _SendPart,
        extra: dict[str, Any],
        condition: dict[str, Any],
    ) -> tuple[str, int | None]:
        upload_id: str = self._call(
            "upload",
            key,
            lambda client, name: _need(
                client.create_multipart_upload(Bucket=self._bucket, Key=name, **extra), "UploadId"
            ),
        )
        try:
            parts = self._send_parts(key, size, part_size, send, upload_id)
            return self._complete(action, key, upload_id, parts, condition)
        except BaseException:
            # Unfinished parts cost money until somebody aborts them; a completed upload no longer
            # exists, so this cannot remove what an unseen success created.
            try:
                self._call(
                    "upload",
                    key,
                    lambda client, name: client.abort_multipart_upload(
                        Bucket=self._bucket, Key=name, UploadId=upload_id
                    ),
                )
            except StoreError as error:
                if error.code != "NoSuchUpload":
                    _log.warning("abort-failed key=%s error=%s", key, error)
            raise

    def _send_parts(
        self, key: str, size: int, part_size: int, send_part: _SendPart, upload_id: str
    ) -> Sequence[CompletedPartTypeDef]:
        part_size = max(part_size, -(-size // (_MAX_PARTS * _MIB)) * _MIB)
        count = -(-size // part_size)

        def send(index: int) -> CompletedPartTypeDef:
            part = range(index * part_size, min(size, (index + 1) * part_size))

            def once(client: S3Client, name: str) -> CompletedPartTypeDef:
                etag = send_part(client, name, upload_id, index + 1, part)
                return {"PartNumber": index + 1, "ETag": etag}

            with self._part_slots:
                return self._persist(lambda: self._call("upload", key, once))

        workers = min(self._settings.concurrency, count)
        if workers > 1:
            # A part is read from its file by the thread that sends it, and all uploads together
            # have `concurrency` slots, so that memory holds no more than that many parts.
            with ThreadPoolExecutor(workers, "walship-part") as pool:
                try:
                    futures = [pool.submit(send, index) for index in range(count)]
                except RuntimeError:  # the interpreter is ending: no more threads
                    pool.shutdown(cancel_futures=True)
                else:
                    try:
                        return [future.result() for future in futures]
                    except BaseException:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
        return [send(index) for index in range(count)]

    def _complete(
        self,
        action: str,
        key: str,
        upload_id: str,
        parts: Sequence[CompletedPartTypeDef],
        condition: dict[str, Any],
    ) -> tuple[str, int | None]:
        try:
            return self._call(
                action,
                key,
                lambda client, name: _stored(
                    client.complete_multipart_upload(
                        Bucket=self._bucket,
                        Key=name,
                        UploadId=upload_id,
                        MultipartUpload={"Parts": parts},
                        **condition,
                    )
                ),
            )
        except StoreError as error:
            if error.code == "NoSuchUpload":  # somebody aborted it: a new one may succeed
                raise StoreUnavailable(str(error), ambiguous=False, code=error.code) from error
            raise

    def _persist(self, attempt: Callable[[], _T]) -> _T:
        for pause in _PART_PAUSES_S:
            try:
                return attempt()
            except StoreUnavailable as error:
                _log.debug("part-retry error=%s", error)
            self._clock.sleep(pause)
        return attempt()

    # --- where the keys are -----------------------------------------------------------------------

    def _find_root(self) -> str:
        """What stands before every key.  Asks the store once, if there is more than one form.

        Litestream makes ``./0000/...`` of ``s3://bucket``, ``/0000/...`` of ``s3://bucket/`` and of
        no path at all, and ``/app/0000/...`` of ``path: /app``; such replicas are continued where
        they are.  Without one, keys start with the clean path or the level.
        """
        with self._lock:
            root = self._root
        if root is not None:
            return root
        plain, *others = self._forms
        found = [plain] if self._has_levels(plain) else []
        for form in others:
            try:
                if self._has_levels(form):
                    found.append(form)
            except StoreError:
                if not found:
                    raise
        self._tell_form(found)
        with self._lock:
            if self._root is None:
                self._root = found[0] if found else plain
            return self._root

    def _tell_form(self, found: Sequence[str]) -> None:
        """Say what somebody may have to know who also uses Litestream."""
        if len(found) > 1:
            _log.warning(
                "several-replicas bucket=%s prefix=%r others=%s: the first is used; move the others"
                " away, or give each a path of its own",
                self._bucket,
                found[0],
                ", ".join(map(repr, found[1:])),
            )
        elif not found and not self._settings.path:
            _log.info(
                "root-form bucket=%s prefix='': a new replica begins at the bucket's top;"
                " Litestream would find one below a path only",
                self._bucket,
            )
        elif found and found[0] != self._forms[0]:
            _log.info("root-form bucket=%s prefix=%r: Litestream's", self._bucket, found[0])

    def _has_levels(self, form: str) -> bool:
        prefix = f"{form}000"  # levels 0 to 9 in 4 hex digits

        def ask(client: S3Client) -> bool:
            answer = client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, MaxKeys=1)
            _need(answer, "IsTruncated")
            return any(_need(item, "Key").startswith(prefix) for item in answer.get("Contents", ()))

        try:
            return self._sent("list", prefix, ask)
        except StoreError as error:
            # Some stores call such a prefix invalid: then nothing can be there.
            about_prefix = error.code not in _KEY_CODES | {"AccessDenied", "NoSuchBucket"}
            if form != self._forms[0] and not error.retryable and about_prefix:
                return False
            raise

    # --- requests and errors ----------------------------------------------------------------------

    def _call(self, action: str, key: str, request: Callable[[S3Client, str], _T]) -> _T:
        """Send one request for ``key``; anything that goes wrong comes out as a StoreError."""
        name = self._find_root() + key
        return self._sent(action, key, lambda client: request(client, name))

    def _sent(self, action: str, key: str, request: Callable[[S3Client], _T]) -> _T:
        connection = self._connection
        try:
            return self._attempt(action, key, connection, request)
        except StoreError as error:
            if error.code not in _KEY_CODES:
                raise
            renewed = self._renewed(connection)
            if renewed is None:
                raise
        # The refused request had no effect.
        return self._attempt(action, key, renewed, request)

    def _renewed(self, refused: _Connection) -> _Connection | None:
        """A connection with other keys than the refused ones, if the SDK's chain has any by now."""
        if self._settings.access_key_id is not None:
            return None
        with self._renewal:
            if self._connection is not refused:
                return self._connection
            now = self._clock.monotonic()
            if self._renewed_at is not None and now - self._renewed_at < _RENEWAL_PAUSE_S:
                return None
            self._renewed_at = now
            try:
                fresh = _connect(self._settings, self._sent_name)
                if fresh.keys() == refused.keys():
                    return None
            except (ConfigError, boto_errors.BotoCoreError, OSError) as error:
                _log.warning("credentials-not-renewed bucket=%s error=%s", self._bucket, error)
                return None
            # The old client is not closed: other threads may be in the middle of a request.
            self._connection = fresh
        _log.info("credentials-renewed bucket=%s", self._bucket)
        return fresh

    def _attempt(
        self, action: str, key: str, connection: _Connection, request: Callable[[S3Client], _T]
    ) -> _T:
        try:
            return request(connection.client)
        except StoreError:
            raise
        except boto_errors.ClientError as error:
            details = error.response.get("Error", {})
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = details.get("Code") or str(status)
            raise self._refused(action, key, code, details.get("Message", ""), status) from error
        except boto_errors.BotoCoreError as error:
            raise self._failed(action, key, error) from error
        except (_UnusableAnswer, ResponseParserError) as error:
            said = _one_line(error)[:200]  # the SDK quotes all that came
            raise self._unavailable(
                action, key, f"unusable answer: {said}", "UnusableAnswer"
            ) from error
        except (OSError, HTTPError) as error:  # bodies are read from urllib3 itself
            raise self._unavailable(action, key, _one_line(error), type(error).__name__) from error

    def _read_body(self, answer: GetObjectOutputTypeDef, body: _Body) -> bytes:
        """The content of an object: as much as was announced, and no slower than is bearable.

        What comes is added to ``body``, which also keeps it if the rest does not come.
        """
        began = self._clock.monotonic()
        n_read = 0
        body.is_broken = False
        with answer["Body"] as raw:
            body.etag = _need_etag(answer)
            # Whatever has come: read() waits for all that it is asked for, so that a server could
            # keep it for hours.  Releases of urllib3 before 2.1 have nothing else.
            read = getattr(raw, "read1", raw.read)
            body.is_broken = True
            while piece := read(_READ_BYTES):
                body.pieces.append(piece)
                n_read += len(piece)
                bearable_s = self._settings.read_timeout_s + n_read / _SLOWEST_BYTES_PER_S
                if self._clock.monotonic() - began > bearable_s:
                    body.is_broken = False  # it would be as slow again
                    raise _UnusableAnswer(f"only {n_read} bytes came in {bearable_s:.0f} s")
        announced = answer.get("ContentLength")
        if announced is not None and n_read != announced:
            raise _UnusableAnswer(f"{n_read} bytes came of {announced}")
        body.is_broken = False
        return body.pieces[0] if len(body.pieces) == 1 else b"".join(body.pieces)

    def _what(self, action: str, key: str) -> str:
        what = f"{key}*" if action == "list" else key or "(anything)"
        return f"cannot {action} {what} in {self.url}"

    def _refused(self, action: str, key: str, code: str, message: str, status: int) -> StoreError:
        what = self._what(action, key)
        said = f"{code}: {_one_line(message)}" if message and message != code else code
        if code == "NoSuchBucket":
            return StoreError(
                f"{what}: bucket {self._bucket!r} does not exist: create it, or check `bucket` "
                "and `endpoint`",
                code=code,
            )
        if code in _NO_KEY_CODES and action == "read":
            return ObjectNotFound(f"no object {key} in {self.url}", code=code)
        if status == 412 or code == "PreconditionFailed":
            happened = "was replaced by another writer" if action == "replace" else "exists already"
            return PreconditionFailed(f"{key} {happened} in {self.url}", code=code)
        if code in _NO_KEY_CODES and action == "replace":
            return PreconditionFailed(f"{key} is gone from {self.url}", code=code)
        if code in _RETRYABLE_CODES or (status in _RETRYABLE_STATUS and code != "NotImplemented"):
            without_effect = code in _WITHOUT_EFFECT_CODES or status == 409
            return self._unavailable(action, key, said, code, without_effect=without_effect)
        advice = _ADVICE.get(code, "")
        if code in _EXPIRED_CODES:
            advice = "the session token has expired: renew the credentials"
        elif not advice and status in (401, 403):
            advice = "check the credentials, what they may do, and the clock of this machine"
        elif not advice and status in (301, 307):
            advice = _ADVICE["PermanentRedirect"]
        if code in _EXPIRED_CODES and self._settings.access_key_id is not None:
            advice += (
                " and start again; or leave them out for a `profile` or a role, whose keys are "
                "read anew when they expire"
            )
        return StoreError(f"{what}: {said}" + (f" ({advice})" if advice else ""), code=code)

    def _unavailable(
        self, action: str, key: str, text: str, code: str, *, without_effect: bool = False
    ) -> StoreUnavailable:
        ambiguous = action in _WITH_EFFECT and not without_effect
        return StoreUnavailable(
            f"{self._what(action, key)}: {text}", ambiguous=ambiguous, code=code
        )

    def _failed(self, action: str, key: str, error: boto_errors.BotoCoreError) -> StoreError:
        what = self._what(action, key)
        code = type(error).__name__
        # Of a request's URL only the server is news: bucket and key were said.
        text = _URL_IN_QUOTES.sub(r"URL \1", _one_line(error))
        if isinstance(error, (boto_errors.NoCredentialsError, boto_errors.PartialCredentialsError)):
            return StoreError(
                f"{what}: no credentials (set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "`access-key-id` and `secret-access-key`, or `profile`)",
                code=code,
            )
        if isinstance(
            error, (boto_errors.CredentialRetrievalError, boto_errors.MetadataRetrievalError)
        ):
            return self._unavailable(action, key, text, code, without_effect=True)
        if isinstance(error, boto_errors.SSLError) and "certificate" in text.lower():
            return StoreError(
                f"{what}: {text} (trust the certificate with AWS_CA_BUNDLE, or check `endpoint`)",
                code=code,
            )
        if isinstance(
            error, (boto_errors.EndpointConnectionError, boto_errors.ConnectTimeoutError)
        ):
            # Nothing was sent.
            return self._unavailable(action, key, text, code, without_effect=True)
        if isinstance(
            error,
            (
                boto_errors.ConnectionError,
                boto_errors.HTTPClientError,
                boto_errors.IncompleteReadError,
            ),
        ):
            return self._unavailable(action, key, text, code)
        return StoreError(f"{what}: {text}", code=code)


def _root_forms(settings: S3Settings) -> tuple[str, ...]:
    """What may stand before every key; the first is ours."""
    forms = [f"{settings.path}/"] if settings.path else [*_TOP_FORMS]
    if settings.written_path is not None:
        forms.append(f"{settings.written_path}/")
    return tuple(dict.fromkeys(forms))


def _connect(settings: S3Settings, sent: Callable[[str], None] | None) -> _Connection:
    verify: bool | str | None = None
    if settings.skip_verify:
        verify = False
        # One warning of ours instead of one of urllib3's with every request.
        _log.warning("tls-not-verified endpoint=%s", settings.endpoint)
        import urllib3

        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    elif settings.ca_bundle is not None:
        if not settings.ca_bundle.is_file():
            raise ConfigError(
                f"ca-bundle (or AWS_CA_BUNDLE, SSL_CERT_FILE): no such file: {settings.ca_bundle}"
            )
        verify = str(settings.ca_bundle)
    try:
        core = get_session()
        # Listings spend most of their time in the general date parser.
        parsers = core.get_component("response_parser_factory")
        parsers.set_parser_defaults(timestamp_parser=_parse_date)
        session = boto3.session.Session(profile_name=settings.profile, botocore_session=core)
        client = session.client(
            "s3",
            endpoint_url=settings.endpoint,
            region_name=settings.region or session.region_name or "us-east-1",
            aws_access_key_id=settings.access_key_id,
            aws_secret_access_key=settings.secret_access_key,
            aws_session_token=settings.session_token,
            verify=verify,
            config=Config(
                user_agent=f"walship boto3/{boto3.__version__}",
                connect_timeout=settings.connect_timeout_s,
                read_timeout=settings.read_timeout_s,
                max_pool_connections=settings.max_connections,
                parameter_validation=False,
                retries={"total_max_attempts": 1, "mode": "standard"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                signature_version="s3v4",
                tcp_keepalive=True,
                s3={  # type: ignore[arg-type]
                    "addressing_style": "path" if settings.force_path_style else "virtual",
                    "payload_signing_enabled": settings.sign_payload,
                    "use_arn_region": True,
                },
            ),
        )
    except (boto_errors.BotoCoreError, ValueError) as error:
        raise ConfigError(f"the S3 settings cannot be used: {_one_line(error)}") from error
    events = client.meta.events
    # Waiting for "100 Continue" costs a round trip with every write.
    events.register_last("before-call.s3", _drop_expect)
    if settings.tigris_consistent:
        events.register("before-sign.s3", _add_tigris_header)
    if settings.require_content_md5:
        events.register("before-call.s3.DeleteObjects", _add_content_md5)
    if sent is not None:
        events.register("before-send.s3", _telling(sent))
    credentials: Credentials | None
    if settings.access_key_id is not None and settings.secret_access_key is not None:
        credentials = Credentials(
            settings.access_key_id, settings.secret_access_key, settings.session_token
        )
    else:
        credentials = session.get_credentials()
    lean = LeanClient(client, credentials, parsers.create_parser("rest-xml"), sent)
    return _Connection(cast("S3Client", lean), credentials)


def _telling(sent: Callable[[str], None]) -> Callable[..., None]:
    """A handler that passes on the name of the operation each request is for."""

    def tell(event_name: str, **_: object) -> None:
        sent(event_name.rpartition(".")[2])

    return tell


def _drop_expect(params: dict[str, Any], **_: object) -> None:
    params["headers"].pop("Expect", None)


def _add_tigris_header(request: AWSRequest, **_: object) -> None:
    # A request that is signed again (after a redirect) must not carry it twice.
    del request.headers["X-Tigris-Consistent"]
    request.headers["X-Tigris-Consistent"] = "true"


def _add_content_md5(params: dict[str, Any], **_: object) -> None:
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode("ascii")


_LISTED_DATE: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")


def _parse_date(text: Any) -> datetime:
    if isinstance(text, str) and _LISTED_DATE.fullmatch(text):
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            pass
    try:
        parsed: datetime = DEFAULT_TIMESTAMP_PARSER(text)
    except ValueError as error:
        raise _UnusableAnswer(_one_line(error)) from error
    return parsed


def _epoch_ms(moment: datetime) -> int:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


def _date_ms(answer: Mapping[str, Any]) -> int | None:
    """The server's clock when it answered, or None if it does not say."""
    try:
        date = answer["ResponseMetadata"]["HTTPHeaders"]["date"]
        return _epoch_ms(parsedate_to_datetime(date))
    except (KeyError, ValueError, TypeError):
        return None


def _need(answer: Mapping[str, Any], name: str) -> Any:
    """What every S3 answer of this kind has."""
    value = answer.get(name)
    if value is None:
        raise _UnusableAnswer(f"it has no {name}")
    return value


def _etag(answer: Mapping[str, Any]) -> str | None:
    etag = answer.get("ETag")
    return etag.strip('"') if isinstance(etag, str) else None


def _need_etag(answer: Mapping[str, Any]) -> str:
    _need(answer, "ETag")
    return _etag(answer) or ""


def _stored(answer: Mapping[str, Any]) -> tuple[str, int | None]:
    """Tag of what was stored, which proves that an object store answered; and the server's time."""
    return _need_etag(answer), _date_ms(answer)


def _copied(answer: Mapping[str, Any]) -> tuple[str, int | None]:
    """As `_stored`, of a copy: its answer begins before it is done, so only a tag means success."""
    return _need_etag(_need(answer, "CopyObjectResult")), _date_ms(answer)


_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def _check_range(told: str, start: int, length: int | None, n_read: int) -> None:
    """Raise unless ``n_read`` bytes are what was asked for, as far as the header tells."""
    match = _CONTENT_RANGE.fullmatch(told)
    if match is None:
        return
    first, last, size = (int(number) for number in match.groups())
    end = size if length is None else min(size, start + length)
    if (first, last + 1, n_read) != (start, end, end - start):
        raise _UnusableAnswer(f"{n_read} bytes ({told}) instead of {start}-{end - 1}")


def _body_size(body: Body) -> int:
    if isinstance(body, Path):
        try:
            return body.stat().st_size
        except OSError as error:
            raise StoreError(f"cannot read {body}: {error.strerror}") from error
    return memoryview(body).nbytes


def _part(body: Body, start: int, length: int) -> bytes | IO[bytes]:
    if not isinstance(body, Path):
        if isinstance(body, bytes) and start == 0 and length == len(body):
            return body
        return bytes(memoryview(body).cast("B")[start : start + length])
    return cast(IO[bytes], _FilePart(body, start, length))


class _FilePart(io.RawIOBase):
    """Part of a file as a body of its own, read as it is sent: memory holds a few kilobytes of it.

    Closes its descriptor when it is dropped.
    """

    def __init__(self, path: Path, start: int, length: int) -> None:
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with this object
            size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error
        if size < start + length:
            self._file.close()
            raise StoreError(f"cannot upload {path}: it became shorter meanwhile")
        self._start = start
        self._length = length
        self._position = 0

    def __len__(self) -> int:
        return self._length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        n_read = os.preadv(self._file.fileno(), [view], self._start + self._position)
        self._position += n_read
        return n_read

    def close(self) -> None:
        self._file.close()
        super().close()


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
