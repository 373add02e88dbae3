"""The admin port of every process: is it alive, is it ready, what does it count.

    GET /livez    200 while the event loop turns; nothing else is asked, for restarting cures nothing else
    GET /readyz   200 when every registered check passes, else 503; JSON says which fails and why
    GET /metrics  Prometheus text

Plaintext and without authentication: it listens on loopback unless told otherwise and is never public. It
is bounded (connections, request size, time), so that a scanner that finds it cannot cost the process its
memory.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Protocol, Self

import h11

from runtime.config import Address, ConfigError, address, setting

log = logging.getLogger(__name__)

Check = Callable[[], Awaitable[str | None]]
"""Looks whether a part of the process can do its work: None when it can, else the reason, for an
operator.
"""

DEFAULT_LISTEN: Final = Address("127.0.0.1", 9464)
MAX_CONNECTIONS: Final = 64
MAX_HEADER_BYTES: Final = 16 * 1024
MAX_BODY_BYTES: Final = 64 * 1024
REQUEST_TIMEOUT_S: Final = 10.0
"""From the first byte awaited to the last byte of the answer."""
IDLE_TIMEOUT_S: Final = 75.0
"""Between two requests of one connection; longer than Prometheus's usual interval, so that it need not
reconnect.
"""
CHECK_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True)
class AdminConfig:
    """Admin port."""

    listen: Address = setting(
        "ATLASCO_ADMIN_LISTEN",
        DEFAULT_LISTEN,
        "Where health and metrics are served, in plaintext; never make it public.",
        parse=address,
    )


class MetricsSource(Protocol):
    """What /metrics shows."""

    def prometheus(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics in the form that Accept asks for, and their content type."""
        ...


@dataclass(frozen=True)
class _Answer:
    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


class _RequestRefused(Exception):
    """The request is answered with this status and the connection is closed."""

    def __init__(self, status: HTTPStatus) -> None:
        self.status = status
        super().__init__(status.phrase)


class AdminServer:
    """Serves the admin port from `open` to `close` (or within `async with`), on the caller's event loop."""

    def __init__(self, config: AdminConfig, metrics: MetricsSource) -> None:
        self._config = config
        self._metrics = metrics
        self._checks: dict[str, Check] = {}
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    def add_check(self, name: str, check: Check) -> None:
        """Have /readyz ask `check`, under `name`; add the checks before `open`, or the process looks
        ready too soon.

        A check that raises, or takes longer than CHECK_TIMEOUT_S, fails.
        """
        if name in self._checks:
            raise ValueError(f"there is a check {name} already")
        self._checks[name] = check

    @property
    def address(self) -> Address:
        """Where the server listens, with the port the system chose if 0 was asked for.

        RuntimeError before `open`.
        """
        if self._server is None or not self._server.sockets:
            raise RuntimeError("the admin server is not open")
        host, port = self._server.sockets[0].getsockname()[:2]
        return Address(host, port)

    async def open(self) -> None:
        """Begin to listen.

        Raises:
            ConfigError: the address is in use, or not of this machine.
        """
        listen = self._config.listen
        try:
            self._server = await asyncio.start_server(self._serve, listen.host, listen.port)
        except OSError as error:
            raise ConfigError([f"ATLASCO_ADMIN_LISTEN: cannot listen on {listen}: {error}"]) from error
        log.info("admin port open", extra={"address": str(self.address)})

    async def close(self) -> None:
        """Stop listening and end the connections that are open."""
        if self._server is None:
            return
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def readiness(self) -> dict[str, str | None]:
        """Every check's reason for not being ready, by name; None for those that pass."""
        reasons = await asyncio.gather(*(_ask(name, check) for name, check in self._checks.items()))
        return dict(zip(self._checks, reasons, strict=True))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
                # Cancelled only by close(): the connection is this task's whole purpose, so it ends here.
                await self._converse(reader, writer)
        finally:
            self._connections.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        first = True
        while True:
            request: h11.Request | None = None
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S if first else IDLE_TIMEOUT_S):
                    request = await _read_request(connection, reader)
                if request is None:
                    return
                answer = await self._answer(request)
            except h11.RemoteProtocolError as error:
                answer = _plain(HTTPStatus(error.error_status_hint))
            except _RequestRefused as refused:
                answer = _plain(refused.status)
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                writer.write(_encode(connection, request, answer))
                await writer.drain()
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()
            first = False

    async def _answer(self, request: h11.Request) -> _Answer:
        path = request.target.decode("ascii", "replace").partition("?")[0]
        routes: Mapping[str, Callable[[h11.Request], Awaitable[_Answer]]] = {
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/metrics": self._metrics_text,
        }
        route = routes.get(path)
        if route is None:
            return _Answer(HTTPStatus.NOT_FOUND, b"see /livez, /readyz and /metrics\n")
        if request.method not in (b"GET", b"HEAD"):
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", "GET, HEAD"))
        try:
            return await route(request)
        except Exception:
            log.exception("admin request failed", extra={"path": path})
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR)

    async def _livez(self, _: h11.Request) -> _Answer:
        return _Answer(HTTPStatus.OK, b"alive\n")

    async def _readyz(self, _: h11.Request) -> _Answer:
        reasons = await self.readiness()
        ready = all(reason is None for reason in reasons.values())
        checks: dict[str, Any] = {
            name: {"ok": True} if reason is None else {"ok": False, "reason": reason}
            for name, reason in reasons.items()
        }
        body = json.dumps({"ready": ready, "checks": checks}, indent=1) + "\n"
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return _Answer(status, body.encode(), "application/json")

    async def _metrics_text(self, request: h11.Request) -> _Answer:
        accept = next((value for name, value in request.headers if name == b"accept"), b"")
        body, content_type = self._metrics.prometheus(accept.decode("latin-1"))
        return _Answer(HTTPStatus.OK, body, content_type)


async def _ask(name: str, check: Check) -> str | None:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await check()
    except TimeoutError:
        return f"no answer within {CHECK_TIMEOUT_S:g} s"
    except Exception as error:
        log.warning("readiness check failed", extra={"check": name}, exc_info=True)
        return f"{type(error).__name__}: {error}"


async def _read_request(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """The next request, its body read and thrown away; None when the client has closed the connection."""
    request: h11.Request | None = None
    body_bytes = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(4096))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body_bytes += len(event.data)
            if body_bytes > MAX_BODY_BYTES:
                raise _RequestRefused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        elif isinstance(event, h11.EndOfMessage):
            return request
        else:
            return None


def _plain(status: HTTPStatus, *headers: tuple[str, str]) -> _Answer:
    return _Answer(status, f"{status.phrase}\n".encode(), headers=headers)


def _encode(connection: h11.Connection, request: h11.Request | None, answer: _Answer) -> bytes:
    headers = [("Content-Type", answer.content_type), ("Content-Length", str(len(answer.body))), *answer.headers]
    if connection.their_state is not h11.DONE:
        headers.append(("Connection", "close"))
    parts = [connection.send(h11.Response(status_code=answer.status, headers=headers, reason=answer.status.phrase))]
    if request is None or request.method != b"HEAD":
        parts.append(connection.send(h11.Data(data=answer.body)))
    parts.append(connection.send(h11.EndOfMessage()))
    return b"".join(part for part in parts if part)
