"""Identity: SPIFFE ids, names, development metadata. Handshakes are in test_tls.py."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.auth import (
    DevelopmentAuthenticator,
    Identity,
    IdentityKind,
    MutualTlsAuthenticator,
    Unauthenticated,
    encode_name,
    name_problem,
    parse_spiffe_id,
    spiffe_id,
)
from gateway.status import Reason
from runtime import pki
from runtime.config import Address, ConfigError

DOMAIN = "dev.example"
DEVICE, SERVICE = IdentityKind.DEVICE, IdentityKind.SERVICE
LOOPBACK = Address("127.0.0.1", 7070)
NOW = datetime(2026, 1, 1, tzinfo=UTC)

names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=32).filter(
    lambda name: name not in (".", "..")
)


class Call:
    """What of a call an authenticator looks at."""

    def __init__(self, metadata: Sequence[tuple[str, str]] = (), pem: bytes | None = None) -> None:
        self._metadata = metadata
        self._pem = pem

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {} if self._pem is None else {"x509_pem_cert": [self._pem]}


def call(*metadata: tuple[str, str], pem: bytes | None = None) -> "grpc.aio.ServicerContext[Any, Any]":
    return cast("grpc.aio.ServicerContext[Any, Any]", Call(metadata, pem))


@given(names, st.sampled_from(IdentityKind), names)
def test_a_spiffe_id_written_reads_back(tenant: str, kind: IdentityKind, name: str) -> None:
    uri = spiffe_id(DOMAIN, tenant, kind, name)
    assert uri.isascii()
    assert parse_spiffe_id(uri, DOMAIN) == (kind, tenant, name)


@given(st.one_of(st.text(max_size=80), st.text("/%.:?#aF2é\x00", max_size=40)))
def test_any_text_is_an_identity_or_a_typed_refusal(text: str) -> None:
    for uri in (text, f"spiffe://{DOMAIN}/tenant/{text}/device/d", f"spiffe://{DOMAIN}/tenant/t/device/{text}"):
        try:
            _, tenant, name = parse_spiffe_id(uri, DOMAIN)
        except Unauthenticated as refused:
            assert refused.reason in (Reason.IDENTITY_MALFORMED, Reason.TRUST_DOMAIN_FOREIGN)
        else:
            assert name_problem(tenant) is None
            assert name_problem(name) is None


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        pytest.param("/tenant/acme/device/pump-7", (DEVICE, "acme", "pump-7"), id="device"),
        pytest.param("/tenant/acme/service/ui", (SERVICE, "acme", "ui"), id="service"),
        pytest.param("/tenant/a%2Fb/device/c%20d", (DEVICE, "a/b", "c d"), id="encoded-slash"),
        pytest.param("/tenant/a/device/%252F", (DEVICE, "a", "%2F"), id="decoded-once"),
        pytest.param("/tenant/a/device/K%c3%bchler", (DEVICE, "a", "Kühler"), id="utf-8"),
        pytest.param("/tenant/a/device/12:ab@x", (DEVICE, "a", "12:ab@x"), id="pchars"),
    ],
)
def test_accepted(uri: str, expected: tuple[IdentityKind, str, str]) -> None:
    assert parse_spiffe_id(f"spiffe://{DOMAIN}{uri}", DOMAIN) == expected


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        pytest.param("", Reason.IDENTITY_MALFORMED, id="empty"),
        pytest.param("https://dev.example/tenant/a/device/d", Reason.IDENTITY_MALFORMED, id="scheme"),
        pytest.param("SPIFFE://dev.example/tenant/a/device/d", Reason.IDENTITY_MALFORMED, id="upper-scheme"),
        pytest.param("spiffe://other.example/tenant/a/device/d", Reason.TRUST_DOMAIN_FOREIGN, id="foreign-domain"),
        pytest.param("spiffe://dev.example.evil/tenant/a/device/d", Reason.TRUST_DOMAIN_FOREIGN, id="longer-domain"),
        pytest.param("spiffe://dev.example:443/tenant/a/device/d", Reason.IDENTITY_MALFORMED, id="port"),
        pytest.param("spiffe://u@dev.example/tenant/a/device/d", Reason.IDENTITY_MALFORMED, id="user"),
        pytest.param("spiffe:///tenant/a/device/d", Reason.IDENTITY_MALFORMED, id="no-domain"),
        pytest.param("spiffe://dev.example/tenant/a", Reason.IDENTITY_MALFORMED, id="short-path"),
        pytest.param("spiffe://dev.example/tenant/a/device/d/", Reason.IDENTITY_MALFORMED, id="trailing-slash"),
        pytest.param("spiffe://dev.example/tenant/a/device/d/e", Reason.IDENTITY_MALFORMED, id="long-path"),
        pytest.param("spiffe://dev.example/tenant/a/admin/d", Reason.IDENTITY_MALFORMED, id="kind"),
        pytest.param("spiffe://dev.example/tenant//device/d", Reason.IDENTITY_MALFORMED, id="empty-tenant"),
        pytest.param("spiffe://dev.example/tenant/a/device/..", Reason.IDENTITY_MALFORMED, id="relative"),
        pytest.param("spiffe://dev.example/tenant/a/device/d?x=1", Reason.IDENTITY_MALFORMED, id="query"),
        pytest.param("spiffe://dev.example/tenant/a/device/d#x", Reason.IDENTITY_MALFORMED, id="fragment"),
        pytest.param("spiffe://dev.example/tenant/a/device/%zz", Reason.IDENTITY_MALFORMED, id="bad-percent"),
        pytest.param("spiffe://dev.example/tenant/a/device/%00", Reason.IDENTITY_MALFORMED, id="nul"),
        pytest.param("spiffe://dev.example/tenant/a/device/%C2%85", Reason.IDENTITY_MALFORMED, id="c1-control"),
        pytest.param("spiffe://dev.example/tenant/a/device/%FF", Reason.IDENTITY_MALFORMED, id="not-utf-8"),
        pytest.param("spiffe://dev.example/tenant/a/device/%C0%AF", Reason.IDENTITY_MALFORMED, id="overlong"),
        pytest.param("spiffe://dev.example/tenant/a/device/" + "d" * 129, Reason.IDENTITY_MALFORMED, id="129-bytes"),
        pytest.param("spiffe://dev.example/tenant/a/device/" + "d" * 5000, Reason.IDENTITY_MALFORMED, id="too-long"),
    ],
)
def test_refused(uri: str, reason: Reason) -> None:
    with pytest.raises(Unauthenticated) as caught:
        parse_spiffe_id(uri, DOMAIN)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("name", "good"),
    [
        pytest.param("d", True, id="one"),
        pytest.param("é" * 64, True, id="128-bytes"),
        pytest.param("é" * 64 + "x", False, id="129-bytes"),
        pytest.param("", False, id="empty"),
        pytest.param("a\nb", False, id="newline"),
        pytest.param("a\x7f", False, id="delete"),
        pytest.param("\ud800", False, id="surrogate"),
    ],
)
def test_names(name: str, good: bool) -> None:
    assert (name_problem(name) is None) is good
    if not good:
        with pytest.raises(ValueError, match=r"name of the device|valid Unicode"):
            spiffe_id(DOMAIN, "t", DEVICE, name)


def test_a_device_names_itself_and_a_service_any() -> None:
    assert Identity("t", DEVICE, "d").may_name("d")
    assert not Identity("t", DEVICE, "d").may_name("e")
    assert Identity("t", SERVICE, "d").may_name("e")


def test_the_credential_is_no_part_of_who_one_is() -> None:
    assert Identity("t", DEVICE, "d", "01", 5.0) == Identity("t", DEVICE, "d")
    assert hash(Identity("t", DEVICE, "d", "01")) == hash(Identity("t", DEVICE, "d", "02"))


def certificate(*uris: str) -> bytes:
    authority = pki.make_authority(DOMAIN, NOW, timedelta(days=365))
    return pki.issue_client(authority, uris, NOW, timedelta(days=1)).certificate


def test_a_certificate_is_an_identity_until_it_expires_or_is_denied() -> None:
    pem = certificate(spiffe_id(DOMAIN, "acme", DEVICE, "pump"))
    denied: set[str] = set()
    now = [NOW.timestamp()]
    authenticator = MutualTlsAuthenticator(DOMAIN, denied=lambda each: each.credential in denied, clock=lambda: now[0])
    identity = authenticator.authenticate(call(pem=pem))
    assert identity == Identity("acme", DEVICE, "pump")
    assert identity.expires_at == (NOW + timedelta(days=1)).timestamp()
    authenticator.recheck(identity)

    denied.add(identity.credential)
    for attempt in (lambda: authenticator.recheck(identity), lambda: authenticator.authenticate(call(pem=pem))):
        with pytest.raises(Unauthenticated) as caught:
            attempt()
        assert caught.value.reason is Reason.CREDENTIAL_REVOKED

    denied.clear()
    now[0] += 86400
    with pytest.raises(Unauthenticated) as caught:
        authenticator.recheck(identity)
    assert caught.value.reason is Reason.CREDENTIAL_EXPIRED


@pytest.mark.parametrize(
    ("pem", "reason"),
    [
        pytest.param(None, Reason.IDENTITY_MISSING, id="plaintext"),
        pytest.param(b"no certificate", Reason.IDENTITY_MALFORMED, id="garbage"),
        pytest.param(certificate(), Reason.IDENTITY_MISSING, id="no-uri"),
        pytest.param(
            certificate("spiffe://dev.example/tenant/a/device/d", "spiffe://dev.example/tenant/b/device/d"),
            Reason.IDENTITY_AMBIGUOUS,
            id="two-uris",
        ),
        pytest.param(
            certificate("spiffe://dev.example/tenant/a/device/d", "https://example.com"),
            Reason.IDENTITY_AMBIGUOUS,
            id="spiffe-id-and-url",
        ),
        pytest.param(certificate("https://example.com"), Reason.IDENTITY_MALFORMED, id="url"),
    ],
)
def test_a_certificate_that_is_no_identity(pem: bytes | None, reason: Reason) -> None:
    with pytest.raises(Unauthenticated) as caught:
        MutualTlsAuthenticator(DOMAIN, clock=NOW.timestamp).authenticate(call(pem=pem))
    assert caught.value.reason is reason
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_a_trust_domain_is_checked_at_the_start() -> None:
    with pytest.raises(ConfigError, match="not a trust domain"):
        MutualTlsAuthenticator("Dev.Example/x")


TENANT = ("atlasco-tenant", "acme")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        pytest.param([TENANT, ("atlasco-device", "pump-7")], Identity("acme", DEVICE, "pump-7"), id="device"),
        pytest.param([TENANT, ("atlasco-service", "ui")], Identity("acme", SERVICE, "ui"), id="service"),
        pytest.param([TENANT, ("atlasco-device", "a b/c:d")], Identity("acme", DEVICE, "a b/c:d"), id="ascii"),
        pytest.param([TENANT, ("atlasco-device", "K%C3%BC")], Identity("acme", DEVICE, "Kü"), id="encoded"),
        pytest.param(
            [("user-agent", "x"), TENANT, ("atlasco-device", "d")], Identity("acme", DEVICE, "d"), id="others"
        ),
    ],
)
def test_development_believes_metadata(metadata: list[tuple[str, str]], expected: Identity) -> None:
    authenticator = DevelopmentAuthenticator(LOOPBACK)
    identity = authenticator.authenticate(call(*metadata))
    assert identity == expected
    authenticator.recheck(identity)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        pytest.param([], Reason.IDENTITY_MISSING, id="nothing"),
        pytest.param([TENANT], Reason.IDENTITY_MISSING, id="tenant-only"),
        pytest.param([("atlasco-device", "d")], Reason.IDENTITY_MISSING, id="no-tenant"),
        pytest.param([TENANT, ("atlasco-device", "d"), ("atlasco-service", "s")], Reason.IDENTITY_AMBIGUOUS, id="both"),
        pytest.param([TENANT, TENANT, ("atlasco-device", "d")], Reason.IDENTITY_AMBIGUOUS, id="twice"),
        pytest.param([TENANT, ("atlasco-device", "")], Reason.IDENTITY_MALFORMED, id="empty"),
        pytest.param([TENANT, ("atlasco-device", "100%")], Reason.IDENTITY_MALFORMED, id="bare-percent"),
        pytest.param([TENANT, ("atlasco-device", "%00")], Reason.IDENTITY_MALFORMED, id="nul"),
    ],
)
def test_development_refuses(metadata: list[tuple[str, str]], reason: Reason) -> None:
    with pytest.raises(Unauthenticated) as caught:
        DevelopmentAuthenticator(LOOPBACK).authenticate(call(*metadata))
    assert caught.value.reason is reason


@given(names, names)
def test_development_takes_any_encoded_name(tenant: str, device: str) -> None:
    metadata = (("atlasco-tenant", encode_name(tenant)), ("atlasco-device", encode_name(device)))
    logging.disable(logging.WARNING)
    try:
        identity = DevelopmentAuthenticator(LOOPBACK).authenticate(call(*metadata))
    finally:
        logging.disable(logging.NOTSET)
    assert identity == Identity(tenant, DEVICE, device)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gateway.example", "", "127.0.0.1.nip.io"])
def test_development_refuses_to_face_a_network(host: str) -> None:
    with pytest.raises(ConfigError, match="anybody on the network"):
        DevelopmentAuthenticator(Address(host, 7070))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_development_says_so_loudly(host: str, caplog: pytest.LogCaptureFixture) -> None:
    DevelopmentAuthenticator(Address(host, 7070))
    assert "DEVELOPMENT AUTHENTICATION" in caplog.text
