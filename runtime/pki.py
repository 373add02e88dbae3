"""Certificates: issuing them for development, and checking the files a server is given.

Pure functions from inputs to bytes; nothing here reads the clock or the disk. The authority made here is
for development and tests: its key lies in a file. A production fleet has its own, and only
`server_problems` is for it.

Everything is ECDSA P-256 and PEM. Identities are URI names (SPIFFE ids) that the caller composes.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLOCK_SKEW: Final = timedelta(minutes=5)
"""A certificate is valid from this long before it was made: devices' clocks run behind."""


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key, each in PEM."""

    certificate: bytes
    key: bytes


def make_authority(trust_domain: str, now: datetime, validity: timedelta) -> KeyPair:
    """A self-signed certificate authority, which carries spiffe://<trust domain> as its own URI name."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"AtlasCo development CA for {trust_domain}")
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(name, name, key, now, now + validity)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(_names([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return KeyPair(_pem(certificate), _key_pem(key))


def trust_domain_of(authority: bytes) -> str:
    """The trust domain of an authority made by `make_authority`. Raises ValueError when it names none."""
    uris = uri_names(load_certificate(authority))
    if len(uris) != 1 or not uris[0].startswith("spiffe://") or "/" in uris[0].removeprefix("spiffe://"):
        raise ValueError("the authority's certificate does not name its trust domain")
    return uris[0].removeprefix("spiffe://")


def issue_server(authority: KeyPair, hosts: Sequence[str], now: datetime, validity: timedelta) -> KeyPair:
    """A server's certificate for DNS names and IP addresses.

    Raises ValueError for a host that is neither.
    """
    if not hosts:
        raise ValueError("a server's certificate needs a host")
    return _issue(authority, hosts[0], [_host(host) for host in hosts], ExtendedKeyUsageOID.SERVER_AUTH, now, validity)


def issue_client(authority: KeyPair, uris: Sequence[str], now: datetime, validity: timedelta) -> KeyPair:
    """A client's certificate with these URI names; one SPIFFE id makes it an identity."""
    names = [x509.UniformResourceIdentifier(uri) for uri in uris]
    return _issue(authority, "AtlasCo client", names, ExtendedKeyUsageOID.CLIENT_AUTH, now, validity)


def load_certificate(pem: bytes) -> x509.Certificate:
    """The first certificate of a PEM text. Raises ValueError."""
    return x509.load_pem_x509_certificate(pem)


def uri_names(certificate: x509.Certificate) -> list[str]:
    """The URI names of a certificate."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return extension.value.get_values_for_type(x509.UniformResourceIdentifier)


def server_problems(certificate: bytes, key: bytes, client_authority: bytes, now: datetime) -> list[str]:
    """What keeps a server from using these three files; empty when nothing does.

    `certificate` is the chain, the server's own first; `client_authority` a bundle.
    """
    problems: list[str] = []
    chain = _load_all(certificate, "the certificate", problems)
    authorities = _load_all(client_authority, "the client authority", problems)
    private: PrivateKeyTypes | None = None
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError):
        # TypeError: the key is encrypted, and there is nobody to type its password.
        problems.append("the key is not an unencrypted private key in PEM")
    if chain and private is not None and chain[0].public_key() != private.public_key():
        problems.append("the key is not the certificate's")
    if chain and not chain[0].not_valid_before_utc <= now < chain[0].not_valid_after_utc:
        first, last = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
        problems.append(f"the certificate is valid from {first.isoformat()} to {last.isoformat()}, not now")
    if authorities and all(each.not_valid_after_utc <= now for each in authorities):
        problems.append("every certificate of the client authority has expired")
    return problems


def _load_all(pem: bytes, what: str, problems: list[str]) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        problems.append(f"{what} is not a certificate in PEM")
        return []


def _issue(
    authority: KeyPair,
    common_name: str,
    names: Sequence[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    now: datetime,
    validity: timedelta,
) -> KeyPair:
    issuer = load_certificate(authority.certificate)
    signer = serialization.load_pem_private_key(authority.key, password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != issuer.public_key():
        raise ValueError("the authority's key is not its certificate's")
    if issuer.not_valid_after_utc <= now:
        raise ValueError(f"the authority expired at {issuer.not_valid_after_utc.isoformat()}")
    key = ec.generate_private_key(ec.SECP256R1())
    # Beyond its issuer's end a certificate is worthless; better that it says so itself.
    until = min(now + validity, issuer.not_valid_after_utc)
    builder = (
        _builder(_name(common_name[:64]), issuer.subject, key, now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(_names(names), critical=False)
    return KeyPair(_pem(builder.sign(signer, hashes.SHA256())), _key_pem(key))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, until) - CLOCK_SKEW)
        .not_valid_after(until)
    )


def _names(names: Sequence[x509.GeneralName]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(names)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not host or not host.isascii() or any(char in host for char in " /:@"):
            raise ValueError(f"{host!r} is neither a DNS name nor an IP address") from None
        return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
