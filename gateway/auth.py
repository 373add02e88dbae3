"""Who calls: tenant and name come from the authenticated peer, never from what it sends.

Callers hold an `Authenticator` and know nothing else. Two exist: mutual TLS for production, and request
metadata for development on loopback. Tokens would be a third: verified with keys that are fetched in the
background, for `authenticate` must not block the event loop.

A stream outlives its authentication, so its owner asks `recheck` now and then: a certificate expires, an
operator revokes it.
"""

import enum
import functools
import ipaddress
import logging
import re
import time
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from urllib.parse import quote

import grpc
from cryptography import x509

from gateway.status import Reason, Refusal
from runtime.config import Address, ConfigError

log = logging.getLogger(__name__)

MAX_NAME_BYTES: Final = 128
MAX_SPIFFE_ID_BYTES: Final = 2048


class Unauthenticated(Refusal):
    """The peer's identity is missing, malformed or no longer good; `reason` says which."""


class IdentityKind(enum.Enum):
    """What a peer is. The values are the words used in SPIFFE ids."""

    DEVICE = "device"
    """One device, which may name only itself."""
    SERVICE = "service"
    """A service of the tenant, which may name any of its devices."""


@dataclass(frozen=True)
class Identity:
    """An authenticated peer. Equal when tenant, kind and name are, whatever the credential."""

    tenant: str
    kind: IdentityKind
    name: str
    credential: str = field(default="", compare=False)
    """What proved it, for deny-lists and logs: a certificate's serial number in hex; empty for none."""
    expires_at: float | None = field(default=None, compare=False)
    """When the credential ends, in seconds since the epoch; None: never."""

    def may_name(self, device: str) -> bool:
        """Whether this peer may speak for, or read, that device of its tenant."""
        return self.kind is IdentityKind.SERVICE or self.name == device


class Authenticator(Protocol):
    """Finds out who calls. Neither method blocks."""

    def authenticate(self, context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
        """Who is at the other end of this call. Raises Unauthenticated."""
        ...

    def recheck(self, identity: Identity) -> None:
        """Raise Unauthenticated if an identity that was good before is no longer: expired, revoked."""
        ...


def nobody_denied(_: Identity) -> bool:
    """The empty deny-list."""
    return False


class MutualTlsAuthenticator:
    """Identity from the client's certificate, which the TLS handshake has verified against the client
    authority.

    The certificate must carry exactly one URI name, the SPIFFE id (see `parse_spiffe_id`). `denied` says
    which identities are revoked; it is asked on every call and on every recheck, so it must be a look
    into memory.
    """

    def __init__(
        self,
        trust_domain: str,
        *,
        denied: Callable[[Identity], bool] = nobody_denied,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ConfigError when `trust_domain` is not one."""
        if not is_trust_domain(trust_domain):
            raise ConfigError([f"{trust_domain!r} is not a trust domain: use a-z, 0-9, '.', '-' and '_'"])
        self._trust_domain = trust_domain
        self._denied = denied
        self._clock = clock

    def authenticate(self, context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
        """See Authenticator."""
        pem = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
        if pem is None:
            raise Unauthenticated(Reason.IDENTITY_MISSING, "no client certificate")
        try:
            uris, serial, expires_at = _certificate_facts(pem)
        except ValueError:
            raise Unauthenticated(Reason.IDENTITY_MALFORMED, "the client certificate cannot be parsed") from None
        if not uris:
            raise Unauthenticated(Reason.IDENTITY_MISSING, "the client certificate has no URI name (SPIFFE id)")
        if len(uris) > 1:
            text = f"the client certificate has {len(uris)} URI names; it must have one, the SPIFFE id"
            raise Unauthenticated(Reason.IDENTITY_AMBIGUOUS, text)
        kind, tenant, name = parse_spiffe_id(uris[0], self._trust_domain)
        identity = Identity(tenant, kind, name, serial, expires_at)
        self.recheck(identity)
        return identity

    def recheck(self, identity: Identity) -> None:
        """See Authenticator."""
        if identity.expires_at is not None and self._clock() >= identity.expires_at:
            raise Unauthenticated(Reason.CREDENTIAL_EXPIRED, "the client certificate has expired")
        if self._denied(identity):
            raise Unauthenticated(Reason.CREDENTIAL_REVOKED, "the client certificate is revoked")


class DevelopmentAuthenticator:
    """Believes what the request's metadata says: for one machine, and never for anybody else's devices.

    Metadata: `atlasco-tenant`, and one of `atlasco-device` and `atlasco-service`. As metadata is ASCII,
    names are percent-encoded as `encode_name` does; a plain name such as "pump-7" is its own encoding.
    """

    def __init__(self, listen: Address) -> None:
        """`listen` is where the gateway serves. Raises ConfigError unless it is loopback."""
        if not is_loopback(listen.host):
            raise ConfigError(
                [
                    f"development authentication on {listen} would let anybody on the network be any device of any "
                    "tenant; listen on 127.0.0.1 or [::1], or use mutual TLS"
                ]
            )
        log.warning(
            "DEVELOPMENT AUTHENTICATION: every caller is believed to be whoever it says it is; not for production",
            extra={"address": str(listen)},
        )

    def authenticate(self, context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
        """See Authenticator."""
        found: dict[str, list[str]] = {"atlasco-tenant": [], "atlasco-device": [], "atlasco-service": []}
        for key, value in context.invocation_metadata() or ():
            if key in found:
                found[key].append(value if isinstance(value, str) else value.decode("latin-1"))
        tenants, devices, services = found.values()
        if not tenants or not (devices or services):
            text = "metadata atlasco-tenant and one of atlasco-device and atlasco-service are needed"
            raise Unauthenticated(Reason.IDENTITY_MISSING, text)
        if len(tenants) > 1 or len(devices) + len(services) > 1:
            text = "metadata atlasco-tenant, and one of atlasco-device and atlasco-service, may be given once"
            raise Unauthenticated(Reason.IDENTITY_AMBIGUOUS, text)
        kind = IdentityKind.DEVICE if devices else IdentityKind.SERVICE
        try:
            return Identity(_decode(tenants[0]), kind, _decode((devices or services)[0]))
        except ValueError as error:
            raise Unauthenticated(Reason.IDENTITY_MALFORMED, f"metadata: {error}") from None

    def recheck(self, identity: Identity) -> None:
        """See Authenticator: nothing expires here."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_trust_domain(text: str) -> bool:
    """Whether `text` is a SPIFFE trust domain: 1 to 255 of a-z, 0-9, '.', '-' and '_'."""
    return re.fullmatch(r"[a-z0-9._-]{1,255}", text) is not None


def name_problem(name: str) -> str | None:
    """What is wrong with the name of a tenant, device, service or attribute; None when it is one.

    A name is 1 to 128 bytes of UTF-8 without control characters.
    """
    if not name:
        return "is empty"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if size > MAX_NAME_BYTES:
        return f"is {size} bytes long, more than {MAX_NAME_BYTES}"
    if any(unicodedata.category(char) == "Cc" for char in name):
        return "holds a control character"
    return None


def encode_name(name: str) -> str:
    """A name as a segment of a SPIFFE id, or as metadata: percent-encoded except a-z A-Z 0-9 '.', '_',
    '~', '-'.
    """
    return quote(name, safe="")


def spiffe_id(trust_domain: str, tenant: str, kind: IdentityKind, name: str) -> str:
    """The SPIFFE id of a peer; the inverse of `parse_spiffe_id`.

    Raises ValueError for what cannot be one.
    """
    if not is_trust_domain(trust_domain):
        raise ValueError(f"{trust_domain!r} is not a trust domain")
    for what, text in (("tenant", tenant), (kind.value, name)):
        problem = name_problem(text)
        if problem is None and text in (".", ".."):
            problem = "is a relative path"
        if problem is not None:
            raise ValueError(f"the name of the {what} {problem}")
    return f"spiffe://{trust_domain}/tenant/{encode_name(tenant)}/{kind.value}/{encode_name(name)}"


# RFC 3986 pchar. Everything else in a name is percent-encoded; a bare "?" or "#" would begin another part
# of the URI.
_SEGMENT: Final = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+")


def parse_spiffe_id(uri: str, trust_domain: str) -> tuple[IdentityKind, str, str]:
    """Kind, tenant and name from spiffe://<trust domain>/tenant/<tenant>/(device|service)/<name>.

    Names are split at the slashes first and percent-decoded after, once: an encoded slash is part of a
    name. Raises Unauthenticated with TRUST_DOMAIN_FOREIGN or IDENTITY_MALFORMED.
    """
    if len(uri) > MAX_SPIFFE_ID_BYTES or not uri.startswith("spiffe://"):
        raise _malformed("it must begin with spiffe:// and have at most 2048 bytes")
    authority, *path = uri.removeprefix("spiffe://").split("/")
    if authority != trust_domain:
        if not is_trust_domain(authority):
            raise _malformed("its trust domain is none")
        text = f"the client certificate is of the trust domain {authority!r}, which is not served here"
        raise Unauthenticated(Reason.TRUST_DOMAIN_FOREIGN, text)
    if len(path) != 4 or path[0] != "tenant" or path[2] not in ("device", "service"):
        raise _malformed("its path must be /tenant/<tenant>/device/<device> or /tenant/<tenant>/service/<service>")
    for segment in (path[1], path[3]):
        if segment in (".", "..") or not _SEGMENT.fullmatch(segment):
            raise _malformed("a name in it is empty, relative, or holds a character that must be percent-encoded")
    try:
        return IdentityKind(path[2]), _decode(path[1]), _decode(path[3])
    except ValueError as error:
        raise _malformed(str(error)) from None


def _malformed(problem: str) -> Unauthenticated:
    return Unauthenticated(Reason.IDENTITY_MALFORMED, f"the SPIFFE id is not valid: {problem}")


def _decode(text: str) -> str:
    """A percent-encoded name, decoded and checked.

    Raises ValueError; unlike urllib's, it repairs nothing.
    """
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise ValueError("a name holds % without two hexadecimal digits")
    raw = re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes([int(match[1], 16)]), text.encode())
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise ValueError("a name is not UTF-8") from None
    problem = name_problem(name)
    if problem is not None:
        raise ValueError(f"a name {problem}")
    return name


# Cached, for parsing costs more than the rest of a small query.
@functools.lru_cache(maxsize=4096)
def _certificate_facts(pem: bytes) -> tuple[tuple[str, ...], str, float]:
    """URI names, serial number in hex, and end of validity of a certificate. Raises ValueError."""
    certificate = x509.load_pem_x509_certificate(pem)
    uris: Iterable[str] = ()
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        pass
    except x509.DuplicateExtension:
        raise ValueError("an extension occurs twice") from None
    return tuple(uris), f"{certificate.serial_number:x}", certificate.not_valid_after_utc.timestamp()
