"""Middleware that holds a response until the commits made for it are in the replica.

    app = DurableASGI(app)          # FastAPI: app.add_middleware(DurableASGI)
    app = DurableWSGI(app)          # Flask: app.wsgi_app = DurableWSGI(app.wsgi_app)

A request that wrote nothing never waits.  Commits are those made in the request's own context: in
its coroutine, and in the thread pools of frameworks, which pass the context on; not those of
threads or background tasks that the application starts by itself with a fresh context.

If the replica does not have them in time, the client gets status 503 with ``Retry-After`` in place
of the response, as long as nothing of that was sent.  The commit is local then and will be shipped:
503 means "not known to be safe", not "nothing happened".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from typing import Any, Final

from walship.aio import wait_for_engines
from walship.replica.errors import ReplicaError
from walship.vfs.commits import Commits, collect
from walship.vfs.durable import wait_for

__all__ = ["DurableASGI", "DurableWSGI"]

Message = MutableMapping[str, Any]
ASGIApp = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]
WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

_STATUS: Final = 503
_HEADERS: Final = (("content-type", "text/plain; charset=utf-8"), ("retry-after", "5"))
_BODY: Final = (
    b"The change was made, but its replica did not confirm it in time. It will be replicated "
    b"later; it has not been undone.\n"
)


class DurableASGI:
    """ASGI middleware; see the module.

    Args:
        app: the application.
        timeout: seconds a response may be held; None holds it as long as it takes.
    """

    def __init__(self, app: ASGIApp, timeout: float | None = 30.0) -> None:
        self._app = app
        self._timeout = timeout

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with collect() as commits:
            await self._app(scope, receive, self._held(commits, send))

    def _held(
        self, commits: Commits, send: Callable[[Message], Awaitable[None]]
    ) -> Callable[[Message], Awaitable[None]]:
        refused = False

        async def held(message: Message) -> None:
            nonlocal refused
            if refused:
                return  # the rest of a response that was replaced
            starts = message["type"] == "http.response.start"
            ends = message["type"] == "http.response.body" and not message.get("more_body")
            if starts or ends:
                try:
                    await wait_for_engines(commits.take(), self._timeout)
                except ReplicaError:
                    if not starts:
                        raise  # part of it is sent: the server cuts the connection
                    refused = True
                    headers = [(name.encode(), value.encode()) for name, value in _HEADERS]
                    start = {"type": "http.response.start", "status": _STATUS, "headers": headers}
                    await send(start)
                    await send({"type": "http.response.body", "body": _BODY})
                    return
            await send(message)

        return held


class DurableWSGI:
    """WSGI middleware; see the module.

    Args:
        app: the application.
        timeout: seconds a response may be held; None holds it as long as it takes.
    """

    def __init__(self, app: WSGIApp, timeout: float | None = 30.0) -> None:
        self._app = app
        self._timeout = timeout

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterator[bytes]:
        commits = Commits()
        started: list[tuple[Any, ...]] = []
        written: list[bytes] = []

        def hold(*args: Any) -> Callable[[bytes], None]:
            started[:] = [args]
            return written.append

        with collect(commits):
            content = self._app(environ, hold)
        try:
            parts = iter(content)
            sent = False
            while True:
                with collect(commits):
                    part = next(parts, None)
                if sent and part is not None:
                    yield part
                    continue
                if not sent and part == b"":
                    continue  # the status may still change
                try:
                    wait_for(commits.take(), self._timeout)
                except ReplicaError:
                    if sent:
                        raise  # part of it is out: the server cuts the connection
                    headers = [(name.title(), value) for name, value in _HEADERS]
                    start_response(f"{_STATUS} Service Unavailable", headers)
                    yield _BODY
                    return
                if not sent:
                    sent = True
                    if started:
                        start_response(*started[0])
                    yield from written
                if part is None:
                    return
                yield part
        finally:
            close = getattr(content, "close", None)
            if close is not None:
                with collect(commits):
                    close()
