"""A sign of life for a watchdog: a GET to a URL at each interval, while replication is well.

The watchdog (healthchecks.io, Uptime Kuma, an own one) raises the alarm when the requests stay
away: also when this program is gone, which no metric could tell.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from .clock import Clock

__all__ = ["Heartbeat", "get"]

log = logging.getLogger("walship.heartbeat")

#: How often it is looked whether all is well, seconds.
_LOOK_S: Final = 15.0
#: How long an answer is waited for, seconds.
_TIMEOUT_S: Final = 30.0
#: How long closing waits for the thread, seconds: it may be waiting for an answer.
_JOIN_S: Final = 1.0


def get(url: str) -> None:
    """Send one GET, and want a success for an answer.

    Raises:
        OSError: it could not be sent, or was answered by an error; the text does not name the URL.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(url, headers={"User-Agent": "walship"}), timeout=_TIMEOUT_S):
            pass
    except HTTPError as error:
        error.close()
        raise OSError(f"HTTP status {error.code}") from None
    except URLError as error:
        cause = error.reason
        text = cause.strerror if isinstance(cause, OSError) else None
        raise OSError(text or type(cause).__name__) from None
    except (HTTPException, ValueError) as error:
        raise OSError(type(error).__name__) from None


class Heartbeat:
    """Sends a GET at each interval, while nothing is wrong.  Thread-safe.

    Args:
        url: where to; it may be a secret, so only its host is ever named.
        interval_s: seconds between two requests.  One that failed is repeated after 15 seconds.
        trouble: says in one line why none should be sent now, or None if all is well; nothing, but
            not None, if that is another process's affair.  Called in the thread of the heartbeat.
        clock: tells the time.
        send: sends the request.
    """

    def __init__(
        self,
        url: str,
        interval_s: float,
        trouble: Callable[[], str | None],
        clock: Clock,
        *,
        send: Callable[[str], None] = get,
    ) -> None:
        self._url = url
        self._host = urlsplit(url).hostname or ""
        self._interval_s = interval_s
        self._trouble = trouble
        self._clock = clock
        self._send = send
        self._next = float("-inf")
        self._was_well: bool | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, in a thread of its own (a daemon); the first request is sent 15 seconds later."""
        self._thread = threading.Thread(target=self._run, name="walship:heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send no more.  Safe to call twice."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        pause = _LOOK_S
        while not self._closed.wait(pause):
            try:
                pause = self.step(self._clock.monotonic())
            except Exception:
                log.exception("unexpected error in the heartbeat")
                pause = _LOOK_S

    def step(self, now: float) -> float:
        """Send a request if one is due and nothing is wrong; returns seconds until the next look.

        Args:
            now: monotonic time.
        """
        if now < self._next:
            return min(_LOOK_S, self._next - now)
        trouble = self._trouble()
        if trouble is not None:
            if trouble:
                self._tell(trouble)
            return _LOOK_S
        try:
            self._send(self._url)
        except OSError as error:
            self._tell(f"{self._host} does not take it: {error}")
            return _LOOK_S
        self._tell(None)
        self._next = now + self._interval_s
        return min(_LOOK_S, self._interval_s)

    def _tell(self, trouble: str | None) -> None:
        """Say it if it is a change: from well to not, or back."""
        is_well = trouble is None
        if is_well == self._was_well:
            return
        self._was_well = is_well
        if is_well:
            log.info("heartbeats are sent to %s every %g s", self._host, self._interval_s)
        else:
            log.warning("no heartbeat: %s", trouble)
