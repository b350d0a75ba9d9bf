"""What a store has to know to be opened: plain values, validated already (``replica.config``).

Nothing here connects, reads the environment or imports an SDK.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

__all__ = ["DEFAULT_PART_SIZE", "LocalSettings", "S3Settings", "StoreSettings"]

#: S3's own lower limit for the parts of a multipart upload.
DEFAULT_PART_SIZE: Final = 5 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """A replica in a directory.

    Attributes:
        path: the directory, absolute; it is made when the first object is written.
    """

    path: Path

    def below(self, path: str) -> LocalSettings:
        """The same for what lies in it under ``path``, which has ``/`` between its parts."""
        return replace(self, path=self.path / path)


@dataclass(frozen=True, kw_only=True)
class S3Settings:
    """A replica in an S3-compatible object store.

    Attributes:
        bucket: bucket name or access-point ARN.
        path: key prefix without slashes at its ends; empty for the bucket's top.
        written_path: the same as it was written, where that is another prefix, ``/app`` say:
            Litestream puts a replica there, and it is continued there.
        endpoint: URL with scheme, or None for AWS.
        region: signing region, or None to ask the SDK's own configuration, then us-east-1.
        access_key_id, secret_access_key, session_token: static keys, or None for the SDK's chain.
        profile: name of a profile of the shared AWS configuration.
        force_path_style: ``endpoint/bucket/key`` rather than ``bucket.endpoint/key``.
        skip_verify: no TLS certificate check.
        ca_bundle: file with the certificates to trust, or None for the SDK's choice.
        sign_payload: put the body's SHA-256 into the signature.
        require_content_md5: send Content-MD5 with batch deletes.
        tigris_consistent: send ``X-Tigris-Consistent: true`` with every request.
        part_size: bytes; larger bodies are uploaded in parts of this size.
        concurrency: parts of one upload in flight.
        storage_class: for ``x-amz-storage-class``.
        sse_customer_algorithm, sse_customer_key: SSE-C; the key is 32 raw bytes.
        sse_kms_key_id: SSE-KMS key id, ARN or alias.
        connect_timeout_s, read_timeout_s: seconds; the second is for silence, not for a whole
            transfer.
        max_connections: connections kept open at most.
    """

    bucket: str
    path: str = ""
    written_path: str | None = field(default=None, compare=False)
    endpoint: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    profile: str | None = None
    force_path_style: bool = False
    skip_verify: bool = False
    ca_bundle: Path | None = None
    sign_payload: bool = True
    require_content_md5: bool = True
    tigris_consistent: bool = False
    part_size: int = DEFAULT_PART_SIZE
    concurrency: int = 5
    storage_class: str | None = None
    sse_customer_algorithm: str | None = None
    sse_customer_key: bytes | None = field(default=None, repr=False)
    sse_kms_key_id: str | None = None
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    max_connections: int = 64

    def below(self, path: str) -> S3Settings:
        """The same for what lies below it under ``path``, which has ``/`` between its parts."""
        below = f"{self.path}/{path}" if self.path else path
        # Of what Litestream does with odd paths only this is left when it appends to them.
        has_slash = self.written_path is not None and self.written_path.startswith("/")
        return replace(self, path=below, written_path=f"/{below}" if has_slash else None)


StoreSettings = LocalSettings | S3Settings
