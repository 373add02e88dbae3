"""`atlasco pki`: files, modes, refusals, and that what it makes is accepted by a TLS handshake."""

import argparse
import ssl
import stat
from pathlib import Path

import pytest

from cli import pki as command
from gateway.auth import IdentityKind, parse_spiffe_id
from runtime.pki import load_certificate, uri_names


def atlasco(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["pki", *argv])
    return int(arguments.run(arguments))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert atlasco("init", str(tmp_path), "--trust-domain", "dev.example") == 0
    return tmp_path


def test_keys_are_private_and_certificates_public(folder: Path) -> None:
    assert atlasco("server", str(folder)) == 0
    assert atlasco("device", str(folder), "acme", "pump-7") == 0
    assert atlasco("service", str(folder), "acme", "ui") == 0
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == [
        "ca.crt",
        "ca.key",
        "device/acme/pump-7.crt",
        "device/acme/pump-7.key",
        "server.crt",
        "server.key",
        "service/acme/ui.crt",
        "service/acme/ui.key",
    ]
    for path in folder.rglob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_identity_is_in_the_certificate(folder: Path) -> None:
    atlasco("device", str(folder), "acme", "Größe/7 a")
    (path,) = (folder / "device" / "acme").glob("*.crt")
    (uri,) = uri_names(load_certificate(path.read_bytes()))
    assert parse_spiffe_id(uri, "dev.example") == (IdentityKind.DEVICE, "acme", "Größe/7 a")


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("../../../escape", id="parent"),
        pytest.param(".hidden", id="dot"),
        pytest.param("é" * 64, id="longest"),
        pytest.param("/etc/passwd", id="absolute"),
    ],
)
def test_no_name_leaves_the_folder(folder: Path, device: str) -> None:
    assert atlasco("device", str(folder), "acme", device) == 0
    made = list((folder / "device" / "acme").iterdir())
    assert {path.suffix for path in made} == {".crt", ".key"}
    assert len(made) == 2


def test_nothing_is_replaced_without_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "ca.key").read_bytes()
    assert atlasco("init", str(folder)) == 1
    assert "--force replaces them" in capsys.readouterr().err
    assert (folder / "ca.key").read_bytes() == before
    assert atlasco("init", str(folder), "--force") == 0
    assert "no longer accepted" in capsys.readouterr().err
    assert (folder / "ca.key").read_bytes() != before
    assert stat.S_IMODE((folder / "ca.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        pytest.param(["device", "{empty}", "t", "d"], "atlasco pki init", id="no-authority"),
        pytest.param(["device", "{pki}", "t", ""], "is empty", id="empty-name"),
        pytest.param(["device", "{pki}", "t", "a\nb"], "control character", id="control-character"),
        pytest.param(["device", "{pki}", "t", "d" * 129], "129 bytes", id="long-name"),
        pytest.param(["device", "{pki}", "t", ".."], "relative path", id="relative"),
        pytest.param(["server", "{pki}", "--host", "a b"], "neither a DNS name", id="host"),
        pytest.param(["init", "{empty}", "--trust-domain", "A/b"], "not a trust domain", id="trust-domain"),
        pytest.param(["show", "{pki}/ca.key"], "no certificate", id="show-a-key"),
        pytest.param(["show", "{pki}/none"], "No such file", id="show-nothing"),
    ],
)
def test_what_is_refused_is_explained(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    text: str,
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    assert atlasco(*(word.format(pki=folder, empty=empty) for word in argv)) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("valid", ["5", "0s", "200000d", "soon"])
def test_a_validity_has_a_unit_and_bounds(folder: Path, capsys: pytest.CaptureFixture[str], valid: str) -> None:
    with pytest.raises(SystemExit) as caught:
        atlasco("device", str(folder), "t", "d", "--valid", valid)
    assert caught.value.code == 2
    assert repr(valid) in capsys.readouterr().err


def test_show_says_who_and_until_when(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atlasco("device", str(folder), "acme", "pump-7", "--valid", "90m")
    atlasco("server", str(folder), "--host", "gateway.example", "--host", "::1")
    capsys.readouterr()
    assert atlasco("show", str(folder / "device/acme/pump-7.crt")) == 0
    text = capsys.readouterr().out
    assert "URI spiffe://dev.example/tenant/acme/device/pump-7" in text
    assert "minutes left)" in text
    assert atlasco("show", str(folder / "server.crt")) == 0
    text = capsys.readouterr().out
    assert "DNS gateway.example" in text
    assert "IP ::1" in text
    assert "29 days left" in text or "30 days left" in text


def test_a_certificate_ends_no_later_than_its_authority(tmp_path: Path) -> None:
    atlasco("init", str(tmp_path), "--valid", "1h")
    atlasco("server", str(tmp_path), "--valid", "30d")
    authority, server = (load_certificate((tmp_path / name).read_bytes()) for name in ("ca.crt", "server.crt"))
    assert server.not_valid_after_utc == authority.not_valid_after_utc


def test_the_gateway_settings_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atlasco("server", str(folder))
    text = capsys.readouterr().out
    for word in ("CERTIFICATE", "KEY", "CLIENT_CA"):
        assert f"export ATLASCO_TLS_{word}={folder}/" in text
    assert "export ATLASCO_TRUST_DOMAIN=dev.example" in text


def handshake(folder: Path, client: Path, host: str) -> None:
    """Both ends of a mutual TLS handshake, in memory. Raises SSLError."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    server.load_verify_locations(folder / "ca.crt")
    server.verify_mode = ssl.CERT_REQUIRED
    # What recent Pythons and other stacks demand of certificates: key identifiers, critical constraints.
    server.verify_flags |= ssl.VERIFY_X509_STRICT
    device = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    device.verify_flags |= ssl.VERIFY_X509_STRICT
    device.load_cert_chain(client, client.with_suffix(".key"))
    to_server, to_device = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_device, server_side=True),
        device.wrap_bio(to_device, to_server, server_hostname=host),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert all(end.version() for end in ends)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_a_strict_handshake_takes_the_certificates(folder: Path, host: str) -> None:
    atlasco("server", str(folder))
    atlasco("device", str(folder), "acme", "pump")
    handshake(folder, folder / "device/acme/pump.crt", host)


def test_a_strict_handshake_refuses_another_host(folder: Path) -> None:
    atlasco("server", str(folder))
    atlasco("device", str(folder), "acme", "pump")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(folder, folder / "device/acme/pump.crt", "evil.example")
