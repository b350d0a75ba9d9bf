"""The heartbeat: when a request is sent, when not, and what is said about it."""

from __future__ import annotations

import http.server
import logging
import threading
from collections.abc import Iterator

import pytest

from support.clock import FakeClock
from walship.replica.heartbeat import Heartbeat, get

SECRET = "0d3b7a4e"


class Watchdog:
    """Where a heartbeat sends to, and what it is told about replication.

    Attributes:
        sent: the times of the requests that arrived.
        trouble: what is wrong with replication.
        failure: what sending raises.
    """

    def __init__(self, interval_s: float = 300.0) -> None:
        self.clock = FakeClock()
        self.sent: list[float] = []
        self.trouble: str | None = None
        self.failure: OSError | None = None
        url = f"https://watch.example/{SECRET}"
        self.heartbeat = Heartbeat(
            url, interval_s, lambda: self.trouble, self.clock, send=self._send
        )
        self.began = self.clock.monotonic()

    def _send(self, url: str) -> None:
        assert SECRET in url
        if self.failure is not None:
            raise self.failure
        self.sent.append(self.clock.monotonic() - self.began)

    def run(self, seconds: float) -> None:
        """Let time pass, with steps when they are due."""
        end = self.clock.monotonic() + seconds
        while self.clock.monotonic() < end:
            self.clock.advance(self.heartbeat.step(self.clock.monotonic()))


def test_a_request_at_each_interval() -> None:
    """While all is well a request goes out at each interval."""
    watchdog = Watchdog(300.0)
    watchdog.run(1000.0)
    assert watchdog.sent == [0.0, 300.0, 600.0, 900.0]


def test_none_while_something_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    """Trouble ends the requests; once it is over they go on at once.  Each change is one line."""
    watchdog = Watchdog(60.0)
    with caplog.at_level(logging.INFO):
        watchdog.run(60.0)
        watchdog.trouble = "app.db: commits of 400 s are not in the replica"
        watchdog.run(300.0)
        watchdog.trouble = None
        watchdog.run(61.0)
    assert watchdog.sent == [0.0, 360.0, 420.0]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "heartbeats are sent to watch.example every 60 s"),
        ("WARNING", "no heartbeat: app.db: commits of 400 s are not in the replica"),
        ("INFO", "heartbeats are sent to watch.example every 60 s"),
    ]


def test_another_process_has_its_say(caplog: pytest.LogCaptureFixture) -> None:
    """Where it is another process's affair nothing is sent and nothing is said."""
    watchdog = Watchdog()
    watchdog.trouble = ""
    with caplog.at_level(logging.INFO):
        watchdog.run(1000.0)
    assert (watchdog.sent, caplog.records) == ([], [])


def test_a_request_that_failed_is_repeated(caplog: pytest.LogCaptureFixture) -> None:
    """A request that failed is sent again after 15 seconds; the log never has the URL."""
    watchdog = Watchdog(300.0)
    watchdog.failure = OSError("HTTP status 503")
    with caplog.at_level(logging.INFO):
        watchdog.run(40.0)
        watchdog.failure = None
        watchdog.run(10.0)
    assert watchdog.sent == [45.0]
    assert [record.getMessage() for record in caplog.records] == [
        "no heartbeat: watch.example does not take it: HTTP status 503",
        "heartbeats are sent to watch.example every 300 s",
    ]


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200 if "good" in self.path else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    """A web server; ``paths`` are those that were asked for."""
    made = http.server.HTTPServer(("127.0.0.1", 0), _Handler)
    made.paths = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_the_request_itself(server: http.server.HTTPServer) -> None:
    """It is a GET; an answer that is an error is a failure, and no error names the URL."""
    url = f"http://127.0.0.1:{server.server_port}"
    get(f"{url}/good?id={SECRET}")
    with pytest.raises(OSError, match="HTTP status 404"):
        get(f"{url}/bad?id={SECRET}")
    assert server.paths == [  # type: ignore[attr-defined]
        f"/good?id={SECRET}",
        f"/bad?id={SECRET}",
    ]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/", "http://walship.invalid/", "http://127.0.0.1:1/a\x7fb"]
)
def test_whatever_goes_wrong_is_one_kind_of_error(url: str) -> None:
    """Nobody there, no such host, no URL: an OSError without the URL."""
    with pytest.raises(OSError) as caught:
        get(f"{url}{SECRET}")
    assert SECRET not in str(caught.value)
    assert str(caught.value)


def test_the_thread_ends(caplog: pytest.LogCaptureFixture) -> None:
    """Closing ends the thread without waiting for the next look; twice is once."""
    watchdog = Watchdog()
    watchdog.heartbeat.start()
    thread = watchdog.heartbeat._thread
    assert thread is not None
    watchdog.heartbeat.close()
    watchdog.heartbeat.close()
    assert not thread.is_alive()
