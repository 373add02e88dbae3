"""`atlasco pki`: a certificate authority and certificates for development and tests.

Layout of the directory:

    ca.crt ca.key                     the authority; ca.crt is the gateway's ATLASCO_TLS_CLIENT_CA
    server.crt server.key             the gateway's
    device/<tenant>/<device>.crt      and .key; names are percent-encoded
    service/<tenant>/<service>.crt    and .key
"""

import argparse
import hashlib
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from cli.argument_types import seconds
from gateway.auth import IdentityKind, encode_name, is_trust_domain, spiffe_id
from runtime import pki

EPILOG: Final = """\
example:
  atlasco pki init pki --trust-domain dev.example
  atlasco pki server pki --host localhost --host 127.0.0.1
  atlasco pki device pki acme pump-7
  atlasco pki service pki acme dashboard
  atlasco pki show pki/device/acme/pump-7.crt

The authority's key is an ordinary file: this is for development and tests. In production give the gateway the
certificates of your own authority, with the same names in them.
"""

LONGEST_FILE_NAME: Final = 200


class PkiError(Exception):
    """The command cannot be carried out; the text says why and what to do."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `atlasco pki` and its subcommands."""
    parser = subparsers.add_parser(
        "pki",
        help="make a development certificate authority and certificates",
        description="Make certificates for mutual TLS between devices, services and the gateway.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="pki commands", metavar="COMMAND", required=True)

    init = _command(commands, "init", _init, "make the certificate authority", "365d")
    init.add_argument(
        "--trust-domain",
        default="atlasco.test",
        metavar="DOMAIN",
        help="SPIFFE trust domain of all identities (default: %(default)s)",
    )

    server = _command(commands, "server", _server, "make the gateway's certificate", "30d")
    server.add_argument(
        "--host",
        action="append",
        metavar="HOST",
        help="DNS name or IP address that clients connect to; repeat it for more "
        "(default: localhost, 127.0.0.1 and ::1)",
    )

    device = _command(commands, "device", _device, "make a device's certificate", "30d")
    device.add_argument("tenant", metavar="TENANT", help="the device's tenant")
    device.add_argument("name", metavar="DEVICE", help="the device's name")

    service = _command(commands, "service", _service, "make a service's certificate", "30d")
    service.add_argument("tenant", metavar="TENANT", help="the service's tenant")
    service.add_argument("name", metavar="NAME", help="the service's name")

    show = commands.add_parser("show", help="say what a certificate file holds")
    show.add_argument("file", metavar="FILE", type=Path, help="a certificate, or several, in PEM")
    show.set_defaults(run=_guarded(_show))


def _command(commands: Any, name: str, run: Any, text: str, valid: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text.capitalize() + ".")
    parser.add_argument("directory", metavar="DIR", type=Path, help="where the authority and certificates are kept")
    parser.add_argument(
        "--valid",
        type=_validity,
        default=_validity(valid),
        metavar="DURATION",
        help=f"how long the certificate is good for, such as 90m or 30d (default: {valid})",
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.set_defaults(run=_guarded(run))
    return parser


def _validity(text: str) -> timedelta:
    valid_s = seconds(text)
    if not 1 <= valid_s <= 100 * 365 * 86400:
        raise argparse.ArgumentTypeError(f"{text!r} must be between 1s and 36500d")
    return timedelta(seconds=valid_s)


def _guarded(run: Any) -> Any:
    def guarded(arguments: argparse.Namespace) -> int:
        try:
            run(arguments)
        except (PkiError, OSError, ValueError) as error:
            print(f"atlasco pki: {error}", file=sys.stderr)
            return 1
        return 0

    return guarded


def _init(arguments: argparse.Namespace) -> None:
    domain = arguments.trust_domain
    if not is_trust_domain(domain):
        raise PkiError(f"{domain!r} is not a trust domain: use a-z, 0-9, '.', '-' and '_'")
    pair = pki.make_authority(domain, datetime.now(UTC), arguments.valid)
    stem = arguments.directory / "ca"
    if arguments.force and stem.with_name("ca.key").exists():
        print("the old authority is replaced: certificates it issued are no longer accepted", file=sys.stderr)
    _write_pair(stem, pair, force=arguments.force)
    print(f"authority for {domain}; next: atlasco pki server {arguments.directory}")


def _server(arguments: argparse.Namespace) -> None:
    hosts = arguments.host or ["localhost", "127.0.0.1", "::1"]
    authority = _authority(arguments.directory)
    pair = pki.issue_server(authority, hosts, datetime.now(UTC), arguments.valid)
    stem = arguments.directory / "server"
    _write_pair(stem, pair, force=arguments.force)
    print("serve with it:")
    print(f"  export ATLASCO_TLS_CERTIFICATE={stem.with_name('server.crt')}")
    print(f"  export ATLASCO_TLS_KEY={stem.with_name('server.key')}")
    print(f"  export ATLASCO_TLS_CLIENT_CA={arguments.directory / 'ca.crt'}")
    print(f"  export ATLASCO_TRUST_DOMAIN={pki.trust_domain_of(authority.certificate)}")


def _device(arguments: argparse.Namespace) -> None:
    _client(arguments, IdentityKind.DEVICE)


def _service(arguments: argparse.Namespace) -> None:
    _client(arguments, IdentityKind.SERVICE)


def _client(arguments: argparse.Namespace, kind: IdentityKind) -> None:
    authority = _authority(arguments.directory)
    uri = spiffe_id(pki.trust_domain_of(authority.certificate), arguments.tenant, kind, arguments.name)
    pair = pki.issue_client(authority, [uri], datetime.now(UTC), arguments.valid)
    folder = arguments.directory / kind.value / _file_name(arguments.tenant)
    _write_pair(folder / _file_name(arguments.name), pair, force=arguments.force)
    print(f"identity {uri}")


def _authority(directory: Path) -> pki.KeyPair:
    try:
        return pki.KeyPair((directory / "ca.crt").read_bytes(), (directory / "ca.key").read_bytes())
    except FileNotFoundError:
        raise PkiError(f"{directory} has no authority; make one: atlasco pki init {directory}") from None


def _file_name(name: str) -> str:
    """A name as a file name: no separator, no relative path, not too long, and different for different
    names.
    """
    encoded = encode_name(name)
    if encoded.startswith("."):
        encoded = "%2E" + encoded[1:]
    if len(encoded) > LONGEST_FILE_NAME:
        encoded = encoded[: LONGEST_FILE_NAME - 17] + "-" + hashlib.sha256(name.encode()).hexdigest()[:16]
    return encoded


def _write_pair(stem: Path, pair: pki.KeyPair, *, force: bool) -> None:
    key, certificate = (stem.parent / f"{stem.name}.{suffix}" for suffix in ("key", "crt"))
    if not force:
        present = [str(path) for path in (key, certificate) if path.exists()]
        if present:
            raise PkiError(f"{' and '.join(present)} exist already; --force replaces them")
    stem.parent.mkdir(parents=True, exist_ok=True)
    _write(key, pair.key, 0o600)
    _write(certificate, pair.certificate, 0o644)
    print(f"wrote {certificate} and {key}")


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file whole, with its mode from the first moment: a gateway may be reading, and others
    looking.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _show(arguments: argparse.Namespace) -> None:
    now = datetime.now(UTC)
    try:
        certificates = x509.load_pem_x509_certificates(arguments.file.read_bytes())
    except ValueError:
        raise PkiError(f"{arguments.file} holds no certificate in PEM") from None
    for index, certificate in enumerate(certificates):
        if index:
            print()
        for label, value in _facts(certificate, now):
            print(f"{label + ':':<10} {value}")


def _facts(certificate: x509.Certificate, now: datetime) -> list[tuple[str, str]]:
    facts = [
        ("subject", certificate.subject.rfc4514_string()),
        ("issuer", certificate.issuer.rfc4514_string()),
        ("serial", f"{certificate.serial_number:x}"),
    ]
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        facts += [("name", f"{_kind(name)} {name.value}") for name in names]
    except x509.ExtensionNotFound:
        facts.append(("name", "none: the gateway refuses such a client"))
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    facts.append(("from", first.isoformat()))
    if last <= now:
        state = "EXPIRED"
    elif first > now:
        state = "not valid yet"
    else:
        left = last - now
        state = f"{left.days} days left" if left.days else f"{left.seconds // 60} minutes left"
    facts.append(("until", f"{last.isoformat()} ({state})"))
    return facts


def _kind(name: x509.GeneralName) -> str:
    match name:
        case x509.UniformResourceIdentifier():
            return "URI"
        case x509.DNSName():
            return "DNS"
        case x509.IPAddress():
            return "IP"
        case _:
            return type(name).__name__
