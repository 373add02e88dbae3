"""Mutual TLS against a real server: who gets in, who does not, and certificates that change under way."""

import argparse
import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from gateway.auth import IdentityKind, MutualTlsAuthenticator, Unauthenticated, spiffe_id
from gateway.status import abort
from gateway.tls import ServerCertificates, TlsConfig
from runtime import pki
from runtime.config import ConfigError, load_settings
from runtime.metrics import MemoryMetrics
from tests.waiting import PATIENCE_S, until

DOMAIN = "dev.example"
DAY = timedelta(days=1)
PUMP = spiffe_id(DOMAIN, "acme", IdentityKind.DEVICE, "pump")


def now() -> datetime:
    return datetime.now(UTC)


AUTHORITY = pki.make_authority(DOMAIN, now(), DAY)
STRANGER = pki.make_authority(DOMAIN, now(), DAY)


class WhoAmI(grpc.GenericRpcHandler):
    """/test/Who answers with the caller's identity; /test/Echo is a stream that repeats what comes."""

    def __init__(self, authenticator: MutualTlsAuthenticator) -> None:
        self._authenticator = authenticator

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        if handler_call_details.method == "/test/Echo":
            return grpc.stream_stream_rpc_method_handler(self._echo)
        return grpc.unary_unary_rpc_method_handler(self._who)

    async def _who(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            identity = self._authenticator.authenticate(context)
        except Unauthenticated as refused:
            await abort(context, refused)
        return f"{identity.tenant}/{identity.kind.value}/{identity.name}".encode()

    async def _echo(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close at once: an orderly TLS close waits for a server that has no reason to answer."""
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@dataclass
class Gateway:
    folder: Path
    port: int
    certificates: ServerCertificates
    metrics: MemoryMetrics

    def install(self, pair: pki.KeyPair, authority: bytes | None = None) -> None:
        install(self.folder, pair, authority)

    def channel(self, client: pki.KeyPair | None, root: bytes = AUTHORITY.certificate) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(
            root, client.key if client else None, client.certificate if client else None
        )
        # Otherwise channels with equal arguments share a connection, and with it a handshake of the past.
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(f"localhost:{self.port}", credentials, options)

    async def ask(self, client: pki.KeyPair | None, root: bytes = AUTHORITY.certificate) -> str:
        async with self.channel(client, root) as channel:
            answer: bytes = await channel.unary_unary("/test/Who")(b"", timeout=PATIENCE_S)
            return answer.decode()

    async def served_serial(self) -> int:
        """The serial number of the certificate that a new connection is shown."""
        context = ssl.create_default_context(cadata=AUTHORITY.certificate.decode())
        context.set_alpn_protocols(["h2"])
        _, writer = await asyncio.open_connection("localhost", self.port, ssl=context)
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        await hang_up(writer)
        return pki.load_certificate(ssl.DER_cert_to_PEM_cert(der).encode()).serial_number


def install(folder: Path, pair: pki.KeyPair, authority: bytes | None = None) -> None:
    (folder / "server.crt").write_bytes(pair.certificate)
    (folder / "server.key").write_bytes(pair.key)
    if authority is not None:
        (folder / "ca.crt").write_bytes(authority)


def config(folder: Path, interval_s: float = 3600.0) -> TlsConfig:
    return TlsConfig(
        certificate=folder / "server.crt",
        key=folder / "server.key",
        client_authority=folder / "ca.crt",
        trust_domain=DOMAIN,
        reload_interval_s=interval_s,
    )


def server_pair(authority: pki.KeyPair = AUTHORITY) -> pki.KeyPair:
    return pki.issue_server(authority, ["localhost", "127.0.0.1"], now(), DAY)


def client_pair(*uris: str, authority: pki.KeyPair = AUTHORITY) -> pki.KeyPair:
    return pki.issue_client(authority, uris or [PUMP], now(), DAY)


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    install(tmp_path, server_pair(), AUTHORITY.certificate)
    metrics = MemoryMetrics()
    async with ServerCertificates(config(tmp_path), metrics) as certificates:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((WhoAmI(MutualTlsAuthenticator(DOMAIN)),))
        port = server.add_secure_port("127.0.0.1:0", certificates.credentials())
        await server.start()
        yield Gateway(tmp_path, port, certificates, metrics)
        await server.stop(None)


async def test_the_certificate_says_who_calls(gateway: Gateway) -> None:
    service = spiffe_id(DOMAIN, "acme", IdentityKind.SERVICE, "Größe/1")
    assert await gateway.ask(client_pair()) == "acme/device/pump"
    assert await gateway.ask(client_pair(service)) == "acme/service/Größe/1"


def expired_pair() -> pki.KeyPair:
    return pki.issue_client(AUTHORITY, [PUMP], now() - timedelta(hours=2), timedelta(hours=1))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: None, id="no-certificate"),
        pytest.param(lambda: client_pair(authority=STRANGER), id="wrong-authority"),
        pytest.param(expired_pair, id="expired"),
        pytest.param(server_pair, id="server-certificate-as-client"),
    ],
)
async def test_no_handshake(gateway: Gateway, make: Callable[[], pki.KeyPair | None]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.ask(make())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await gateway.ask(client_pair()) == "acme/device/pump"


@pytest.mark.parametrize(
    ("uris", "text"),
    [
        pytest.param([PUMP, PUMP.replace("pump", "fan")], "2 URI names", id="two-names"),
        pytest.param(["spiffe://other.example/tenant/acme/device/pump"], "other.example", id="foreign-domain"),
        pytest.param([f"spiffe://{DOMAIN}/acme/pump"], "its path must be", id="foreign-path"),
        pytest.param([f"spiffe://{DOMAIN}/tenant/acme/device/%00"], "control character", id="control-character"),
    ],
)
async def test_a_handshake_but_no_identity(gateway: Gateway, uris: list[str], text: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=text) as caught:
        await gateway.ask(client_pair(*uris))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_client_does_not_take_a_strangers_server(gateway: Gateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.ask(client_pair(), STRANGER.certificate)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        pytest.param(ssl.TLSVersion.TLSv1_1, False, id="1.1"),
        pytest.param(ssl.TLSVersion.TLSv1_2, True, id="1.2"),
        pytest.param(ssl.TLSVersion.TLSv1_3, True, id="1.3"),
    ],
)
async def test_tls_versions(gateway: Gateway, version: ssl.TLSVersion, accepted: bool) -> None:
    context = ssl.create_default_context(cadata=AUTHORITY.certificate.decode())
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # the client offers 1.1 at all only at this level
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    pair = client_pair()
    (gateway.folder / "client.pem").write_bytes(pair.certificate + pair.key)
    context.load_cert_chain(gateway.folder / "client.pem")
    opening = asyncio.open_connection("localhost", gateway.port, ssl=context)
    if not accepted:
        with pytest.raises((ssl.SSLError, ConnectionError)) as caught:
            await opening
        assert "NO_PROTOCOLS_AVAILABLE" not in str(caught.value), "the client itself did not offer this version"
        return
    _, writer = await opening
    await hang_up(writer)


async def test_a_new_certificate_serves_new_connections_and_open_streams_go_on(gateway: Gateway) -> None:
    before = await gateway.served_serial()
    async with gateway.channel(client_pair()) as channel:
        stream = channel.stream_stream("/test/Echo")()
        await stream.write(b"1")
        assert await stream.read() == b"1"

        gateway.install(server_pair())
        assert await gateway.certificates.reload()
        after = await gateway.served_serial()
        assert after != before
        assert await gateway.served_serial() == after

        await stream.write(b"2")
        assert await stream.read() == b"2"
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
    assert gateway.metrics.value("atlasco_tls_reloads", result="loaded") == 1
    assert not await gateway.certificates.reload()


async def test_a_new_client_authority_lets_its_clients_in_and_shuts_the_old_out(gateway: Gateway) -> None:
    gateway.install(server_pair(), STRANGER.certificate)
    assert await gateway.certificates.reload()
    assert await gateway.ask(client_pair(authority=STRANGER)) == "acme/device/pump"
    with pytest.raises(grpc.aio.AioRpcError):
        await gateway.ask(client_pair())


def break_key(folder: Path) -> None:
    (folder / "server.key").write_bytes(server_pair().key)


def break_certificate(folder: Path) -> None:
    (folder / "server.crt").write_bytes(b"-----BEGIN CERTIFICATE-----\nhalf")


def break_authority(folder: Path) -> None:
    (folder / "ca.crt").write_bytes(b"")


def break_validity(folder: Path) -> None:
    install(folder, pki.issue_server(AUTHORITY, ["localhost"], now() - 2 * DAY, DAY))


def remove_key(folder: Path) -> None:
    (folder / "server.key").unlink()


def bloat(folder: Path) -> None:
    (folder / "ca.crt").write_bytes(b"#" * 2_000_000)


BREAKAGES = [
    pytest.param(break_key, "the key is not the certificate's", id="foreign-key"),
    pytest.param(break_certificate, "not a certificate in PEM", id="half-a-certificate"),
    pytest.param(break_authority, "client authority is not a certificate", id="empty-authority"),
    pytest.param(break_validity, "not now", id="expired"),
    pytest.param(remove_key, "No such file", id="missing-key"),
    pytest.param(bloat, "larger than", id="huge-file"),
]


@pytest.mark.parametrize(("damage", "text"), BREAKAGES)
async def test_a_broken_file_keeps_the_old_certificate(
    gateway: Gateway, damage: Callable[[Path], None], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = await gateway.served_serial()
    damage(gateway.folder)
    for _ in range(3):
        assert not await gateway.certificates.reload()
    assert await gateway.served_serial() == before
    assert await gateway.ask(client_pair()) == "acme/device/pump"
    assert gateway.metrics.value("atlasco_tls_reloads", result="failed") == 1
    complaints = [record for record in caplog.records if "old certificate stays" in record.message]
    assert len(complaints) == 1
    assert text in str(complaints[0].__dict__["problems"])

    gateway.install(server_pair(), AUTHORITY.certificate)
    assert await gateway.certificates.reload()
    assert await gateway.served_serial() != before


@pytest.mark.parametrize(("damage", "text"), BREAKAGES)
async def test_broken_files_at_the_start_are_a_configuration_error(
    tmp_path: Path, damage: Callable[[Path], None], text: str
) -> None:
    install(tmp_path, server_pair(), AUTHORITY.certificate)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=text):
        await ServerCertificates(config(tmp_path), MemoryMetrics()).open()


async def test_the_files_are_watched_without_being_asked(tmp_path: Path) -> None:
    install(tmp_path, server_pair(), AUTHORITY.certificate)
    metrics = MemoryMetrics()
    async with ServerCertificates(config(tmp_path, interval_s=0.01), metrics):
        assert 0 < metrics.value("atlasco_tls_certificate_remaining_seconds") <= DAY.total_seconds()
        break_key(tmp_path)
        await until(lambda: metrics.value("atlasco_tls_reloads", result="failed") == 1)
        install(tmp_path, server_pair())
        await until(lambda: metrics.value("atlasco_tls_reloads", result="loaded") == 1)


async def test_a_certificate_from_the_future_is_taken_when_its_time_comes(tmp_path: Path) -> None:
    install(tmp_path, server_pair(), AUTHORITY.certificate)
    offset = [timedelta()]
    metrics = MemoryMetrics()
    certificates = ServerCertificates(config(tmp_path), metrics, clock=lambda: now() + offset[0])
    async with certificates:
        install(tmp_path, pki.issue_server(AUTHORITY, ["localhost"], now() + timedelta(hours=1), DAY))
        assert not await certificates.reload()
        offset[0] = timedelta(hours=2)
        assert await certificates.reload()


@pytest.mark.parametrize(
    "missing", ["ATLASCO_TLS_CERTIFICATE", "ATLASCO_TLS_KEY", "ATLASCO_TLS_CLIENT_CA", "ATLASCO_TRUST_DOMAIN"]
)
def test_mutual_tls_is_configured_whole_or_not_at_all(missing: str) -> None:
    environ = {
        "ATLASCO_TLS_CERTIFICATE": "/c",
        "ATLASCO_TLS_KEY": "/k",
        "ATLASCO_TLS_CLIENT_CA": "/a",
        "ATLASCO_TRUST_DOMAIN": DOMAIN,
    }
    assert load_settings(TlsConfig, argparse.Namespace(), environ).enabled
    del environ[missing]
    with pytest.raises(ConfigError, match=f"missing: {missing}"):
        load_settings(TlsConfig, argparse.Namespace(), environ)
    assert not load_settings(TlsConfig, argparse.Namespace(), {}).enabled
