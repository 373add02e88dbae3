"""The admin port over real sockets: answers, readiness, and its bounds."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable

import pytest

from runtime import admin as admin_module
from runtime.admin import AdminConfig, AdminServer
from runtime.config import Address, ConfigError
from runtime.metrics import OpenTelemetryMetrics
from tests.waiting import PATIENCE_S


@pytest.fixture
async def metrics() -> AsyncIterator[OpenTelemetryMetrics]:
    made = OpenTelemetryMetrics("test")
    yield made
    made.close()


@pytest.fixture
async def admin(metrics: OpenTelemetryMetrics) -> AsyncIterator[AdminServer]:
    async with AdminServer(AdminConfig(listen=Address("127.0.0.1", 0)), metrics) as server:
        yield server


class Peer:
    """A client that can be as rude as a test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, admin: AdminServer) -> "Peer":
        return cls(*await asyncio.open_connection(admin.address.host, admin.address.port))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, *, head: bool = False) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(PATIENCE_S):
            start, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = b"" if head else await self.reader.readexactly(int(headers["content-length"]))
            return int(start.split()[1]), headers, body

    async def rest(self) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


async def get(admin: AdminServer, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    peer = await Peer.to(admin)
    await peer.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = await peer.answer(head=method == "HEAD")
    await peer.close()
    return answer


async def test_alive(admin: AdminServer) -> None:
    assert (await get(admin, "/livez"))[0] == 200
    assert (await get(admin, "/livez?verbose=1"))[0] == 200


async def test_metrics_are_prometheus_text(admin: AdminServer, metrics: OpenTelemetryMetrics) -> None:
    metrics.count("atlasco_stream_opens", 3)
    status, headers, body = await get(admin, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"atlasco_stream_opens_total 3.0" in body


async def test_ready_when_every_check_passes(admin: AdminServer) -> None:
    reasons: dict[str, str | None] = {"storage": None, "partitions": None}

    def check(name: str) -> admin_module.Check:
        async def look() -> str | None:
            return reasons[name]

        return look

    for name in reasons:
        admin.add_check(name, check(name))
    assert (await get(admin, "/readyz"))[0] == 200
    reasons["partitions"] = "none for tomorrow"
    status, headers, body = await get(admin, "/readyz")
    assert (status, headers["content-type"]) == (503, "application/json")
    assert json.loads(body) == {
        "ready": False,
        "checks": {"storage": {"ok": True}, "partitions": {"ok": False, "reason": "none for tomorrow"}},
    }
    with pytest.raises(ValueError, match="storage"):
        admin.add_check("storage", check("storage"))


async def test_a_check_that_raises_or_hangs_fails(admin: AdminServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "CHECK_TIMEOUT_S", 0.05)

    async def broken() -> str | None:
        raise ValueError("no table")

    async def hanging() -> str | None:
        await asyncio.Event().wait()
        return None

    admin.add_check("broken", broken)
    admin.add_check("hanging", hanging)
    status, _, body = await get(admin, "/readyz")
    checks = json.loads(body)["checks"]
    assert status == 503
    assert checks["broken"]["reason"] == "ValueError: no table"
    assert checks["hanging"]["reason"] == "no answer within 0.05 s"


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        pytest.param("/", "GET", 404, id="root"),
        pytest.param("/livez/", "GET", 404, id="slash"),
        pytest.param("/livez", "POST", 405, id="post"),
        pytest.param("/livez", "HEAD", 200, id="head"),
    ],
)
async def test_other_requests(admin: AdminServer, path: str, method: str, status: int) -> None:
    assert (await get(admin, path, method))[0] == status


async def test_one_connection_carries_many_requests(admin: AdminServer) -> None:
    peer = await Peer.to(admin)
    await peer.send(b"HEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    assert (await peer.answer(head=True))[0] == 200
    assert (await peer.answer(head=True))[0] == 200
    await peer.send(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await peer.answer())[2] == b"alive\n"
    assert await peer.rest() == b""
    await peer.close()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        pytest.param(b"NONSENSE\r\n\r\n", 400, id="nonsense"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, id="tls"),
        pytest.param(b"GET /livez HTTP/1.1\r\n\r\n", 400, id="no-host"),
        pytest.param(b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000, 431, id="huge-header"),
        pytest.param(
            b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n" + b"a" * 90_000,
            413,
            id="huge-body",
        ),
    ],
)
async def test_bad_requests_are_refused_and_cut_off(admin: AdminServer, request_bytes: bytes, status: int) -> None:
    peer = await Peer.to(admin)
    await peer.send(request_bytes)
    assert (await peer.answer())[0] == status
    await peer.close()
    assert (await get(admin, "/livez"))[0] == 200


async def test_a_client_that_dawdles_is_cut_off(admin: AdminServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "REQUEST_TIMEOUT_S", 0.05)
    peer = await Peer.to(admin)
    await peer.send(b"GET /livez HTTP/1.1\r\n")
    assert await peer.rest() == b""
    await peer.close()


async def test_connections_are_bounded(admin: AdminServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "MAX_CONNECTIONS", 2)
    held = []
    for _ in range(2):
        peer = await Peer.to(admin)
        await peer.send(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await peer.answer())[0] == 200
        held.append(peer)
    turned_away = await Peer.to(admin)
    assert await turned_away.rest() == b""
    for peer in (*held, turned_away):
        await peer.close()


async def test_a_failure_within_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def prometheus(self, accept: str = "") -> tuple[bytes, str]:
            raise ValueError("no")

    async with AdminServer(AdminConfig(listen=Address("127.0.0.1", 0)), Broken()) as admin:
        assert (await get(admin, "/metrics"))[0] == 500
        assert (await get(admin, "/livez"))[0] == 200
    assert "admin request failed" in caplog.text


async def test_close_ends_open_connections(metrics: OpenTelemetryMetrics) -> None:
    admin = AdminServer(AdminConfig(listen=Address("127.0.0.1", 0)), metrics)
    with pytest.raises(RuntimeError, match="not open"):
        _ = admin.address
    await admin.open()
    peer = await Peer.to(admin)
    await peer.send(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    await peer.answer()
    closing: Awaitable[None] = admin.close()
    async with asyncio.timeout(PATIENCE_S):
        await closing
    assert await peer.rest() == b""
    await peer.close()
    await admin.close()


async def test_an_address_in_use_is_an_error(admin: AdminServer, metrics: OpenTelemetryMetrics) -> None:
    with pytest.raises(ConfigError, match=r"ATLASCO_ADMIN_LISTEN: cannot listen on .* address already in use"):
        await AdminServer(AdminConfig(listen=admin.address), metrics).open()


def test_the_default_is_loopback() -> None:
    assert str(AdminConfig().listen) == "127.0.0.1:9464"
