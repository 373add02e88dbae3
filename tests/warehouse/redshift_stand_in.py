"""Redshift on the wire, PostgreSQL behind it: lets the real driver, the real SQL and the real files work together.

What it does beyond passing messages on:

- answers the driver's TLS request with a certificate of a test authority, and asks for the password in clear under it;
- takes the parameters out of the startup message that PostgreSQL does not know, and reports a Redshift version;
- carries out COPY … FROM 's3://…' … FORMAT AS PARQUET MANIFEST: reads the manifest and the files from the S3 that boto3
  is configured for, checks the lengths, matches columns by position, and copies the rows into PostgreSQL within the
  session's transaction;
- takes DISTKEY, SORTKEY, DISTSTYLE and ENCODE out of DDL, and says DATEDIFF in microseconds as PostgreSQL does.

What it cannot show: Redshift's isolation (1023), how rows are distributed and sorted, what Redshift's planner makes of
a statement, and statements that PostgreSQL takes and Redshift does not.
"""

import datetime
import io
import ipaddress
import json
import os
import re
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import psycopg
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pc
import pyarrow.parquet as pq
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.waiting import PATIENCE_S

USER, PASSWORD = "loader", "a test's password"
_SSL_REQUEST = 80877103
_COPY = re.compile(
    r"^\s*COPY\s+(?P<table>\S+)\s+FROM\s+'(?P<url>s3://(?:[^']|'')+)'\s+IAM_ROLE\s+(?:default|'[^']+')\s+"
    r"FORMAT\s+AS\s+PARQUET\s+MANIFEST\s*$",
    re.IGNORECASE | re.DOTALL,
)
_DDL_WORDS = re.compile(r"\b(?:DISTSTYLE\s+\w+|DISTKEY\s*\([^)]*\)|SORTKEY\s*\([^)]*\)|ENCODE\s+\w+)", re.IGNORECASE)

_DATEDIFF = re.compile(r"\bdatediff\(microsecond, (TIMESTAMP '[^']+'), (\w+)\)", re.IGNORECASE)
_MICROSECONDS = r"CAST(extract(epoch FROM \2 - \1) * 1000000 AS BIGINT)"


class CopyFailed(Exception):
    """What Redshift would say of a COPY."""


def to_postgres(statement: str) -> str:
    """A statement without Redshift's own words."""
    return _DATEDIFF.sub(_MICROSECONDS, _DDL_WORDS.sub("", statement))


class RedshiftStandIn:
    """Listens on localhost from `start` to `stop`. `fail_next`: called with a COPY's table, may raise CopyFailed or cut
    the connection by raising ConnectionError."""

    def __init__(self, postgres_dsn: str, certificate: tuple[Path, Path]) -> None:
        self._dsn = postgres_dsn
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(*certificate)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.on_copy: Callable[[str], None] = lambda _: None
        self.on_statement: Callable[[str], None] = lambda _: None
        # Set: the next commit is carried out and its answer withheld; the connection is cut instead.
        self.after_next_commit = False
        self.copies: list[str] = []
        # Cleared: new connections are taken, and nothing is said on them.
        self.speaks = threading.Event()
        self.speaks.set()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    @property
    def dsn(self) -> str:
        return f"redshift://{USER}:{PASSWORD.replace(' ', '%20')}@localhost:{self.port}/telemetry"

    def start(self) -> None:
        thread = threading.Thread(target=self._accept, name="redshift-stand-in")
        thread.start()
        self._threads.append(thread)

    def stop(self) -> None:
        # A plain close would leave accept waiting.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.speaks.set()
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def cut(self) -> None:
        """Cut every connection, as a cluster does that restarts."""
        for connection in list(self._sockets):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,))
            thread.start()
            self._threads.append(thread)

    def _serve(self, client: socket.socket) -> None:
        self._sockets.add(client)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.speaks.wait()
            _Session(self, client, self._dsn, self._tls).run()
        except (OSError, EOFError, psycopg.Error):
            pass
        finally:
            self._sockets.discard(client)
            client.close()


class _Session:
    """One client. A single thread moves the messages of both directions, so that a COPY has the backend to itself."""

    def __init__(self, stand_in: RedshiftStandIn, client: socket.socket, dsn: str, tls: ssl.SSLContext) -> None:
        self._stand_in = stand_in
        self._raw = client
        self._dsn = dsn
        self._tls = tls
        self._skipping = False

    def run(self) -> None:
        (length, code) = struct.unpack(">ii", _exactly(self._raw, 8))
        assert (length, code) == (8, _SSL_REQUEST), "the driver is to ask for TLS"
        self._raw.sendall(b"S")
        with self._tls.wrap_socket(self._raw, server_side=True) as client:
            self._stand_in._sockets.add(client)
            try:
                self._converse(client)
            finally:
                self._stand_in._sockets.discard(client)

    def _converse(self, client: ssl.SSLSocket) -> None:
        (length,) = struct.unpack(">i", _exactly(client, 4))
        fields = _exactly(client, length - 4)[4:].split(b"\0")
        parameters = dict(zip(fields[::2], fields[1::2], strict=False))
        assert b"client_protocol_version" in parameters, "this is not Redshift's driver"
        client.sendall(_message(b"R", struct.pack(">i", 3)))
        kind, answer = _read_message(client)
        if kind != b"p" or (parameters[b"user"], answer) != (USER.encode(), PASSWORD.encode() + b"\0"):
            client.sendall(_error("28000", "password authentication failed"))
            return
        # psycopg knows how to log in; after that its socket is ours.
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute("SET timezone = 'UTC'")
            with socket.socket(fileno=os.dup(connection.pgconn.socket)) as backend:
                backend.setblocking(True)
                # Messages are passed on one by one; without this each would wait for the one before to be confirmed.
                backend.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.sendall(
                    _message(b"R", struct.pack(">i", 0))
                    + b"".join(
                        _message(b"S", name + b"\0" + value + b"\0")
                        for name, value in (
                            (b"server_version", b"8.0.2"),
                            (b"client_encoding", b"UTF8"),
                            (b"server_protocol_version", b"0"),
                        )
                    )
                    + _message(b"K", struct.pack(">ii", 1, 1))
                    + _message(b"Z", b"I")
                )
                self._pump(client, backend)

    def _pump(self, client: ssl.SSLSocket, backend: socket.socket) -> None:
        executed = False
        while True:
            readable = [client] if client.pending() else select.select([client, backend], [], [])[0]
            if backend in readable:
                data = backend.recv(65536)
                if not data:
                    return
                client.sendall(data)
            if client in readable:
                kind, body = _read_message(client)
                if kind == b"X":
                    return
                if self._skipping and kind != b"S":
                    continue
                self._skipping = False
                if kind == b"P":
                    name, text, rest = body.split(b"\0", 1)[0], *body.split(b"\0", 1)[1].split(b"\0", 1)
                    statement = text.decode()
                    self._stand_in.on_statement(statement)
                    copy = _COPY.match(statement)
                    if copy is not None:
                        refusal = self._copy(backend, copy["table"], copy["url"].replace("''", "'"))
                        if refusal is not None:
                            client.sendall(refusal)
                            self._skipping = True
                            continue
                        statement = "SELECT 1 WHERE false"
                    body = name + b"\0" + to_postgres(statement).encode() + b"\0" + rest
                backend.sendall(_message(kind, body))
                if kind == b"S" and self._stand_in.after_next_commit and executed:
                    self._stand_in.after_next_commit = False
                    _until_ready(backend)
                    raise ConnectionError
                executed = kind == b"E" and self._stand_in.after_next_commit

    def _copy(self, backend: socket.socket, table: str, url: str) -> bytes | None:
        """Carry out a COPY in the backend's transaction; the message of an error, or None."""
        try:
            self._stand_in.on_copy(table)
            text = b"".join(_csv(content) for content in _manifest_files(url))
        except CopyFailed as error:
            # The transaction has failed in Redshift, so it has to here.
            backend.sendall(_message(b"Q", b"SELECT 1/0\0"))
            _until_ready(backend)
            return _error("XX000", str(error))
        backend.sendall(_message(b"Q", f"COPY {table} FROM STDIN (FORMAT csv)\0".encode()))
        kind, body = _read_message(backend)
        if kind == b"G":
            for start in range(0, len(text), 1 << 20):
                backend.sendall(_message(b"d", text[start : start + (1 << 20)]))
            backend.sendall(_message(b"c", b""))
            failed = _until_ready(backend)
        else:
            failed = _message(kind, body)
            _until_ready(backend)
        self._stand_in.copies.append(table)
        return failed


def _manifest_files(url: str) -> list[pa.Table]:
    client = boto3.client("s3")

    def read(address: str) -> bytes:
        parts = urlsplit(address)
        try:
            return bytes(client.get_object(Bucket=parts.netloc, Key=parts.path.lstrip("/"))["Body"].read())
        except client.exceptions.NoSuchKey as error:
            raise CopyFailed(f"{address} does not exist") from error

    files = []
    for entry in json.loads(read(url))["entries"]:
        assert entry["mandatory"] is True
        content = read(entry["url"])
        if entry["meta"]["content_length"] != len(content):
            raise CopyFailed(f"{entry['url']} has another length than the manifest says")
        files.append(pq.read_table(io.BytesIO(content)))
    return files


def _csv(table: pa.Table) -> bytes:
    """By position; a NULL is an empty field without quotes, an empty text has them."""
    sink = io.BytesIO()
    for i, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            assert field.type.unit == "us", "Redshift reads microseconds alone"
            text = pa.compute.strftime(table.column(i), format="%Y-%m-%d %H:%M:%S")
            table = table.set_column(i, field.name, text)
    pc.write_csv(table, sink, pc.WriteOptions(include_header=False, quoting_style="needed"))
    return sink.getvalue()


def _until_ready(backend: socket.socket) -> bytes | None:
    """Read to ReadyForQuery; the ErrorResponse on the way, if there was one."""
    failed = None
    while True:
        kind, body = _read_message(backend)
        if kind == b"E":
            failed = _message(kind, body)
        if kind == b"Z":
            return failed


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack(">i", len(body) + 4) + body


def _read_message(source: socket.socket) -> tuple[bytes, bytes]:
    kind = _exactly(source, 1)
    (length,) = struct.unpack(">i", _exactly(source, 4))
    return kind, _exactly(source, length - 4)


def _exactly(source: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = source.recv(size)
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _error(state: str, text: str) -> bytes:
    return _message(b"E", f"SERROR\0C{state}\0M{text}\0\0".encode())


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost: its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = directory / "certificate.pem", directory / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths
