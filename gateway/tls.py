"""Mutual TLS for the gateway's port, with certificates that change without a restart.

Certificates live for days, streams for weeks: a new certificate must serve the next connection without
ending the others. The files are read again every few seconds; what is new and good is served from then
on. What is broken (half written, a key that does not fit, expired) is logged and counted, and the old one
stays.

The transport speaks TLS 1.2 and 1.3 only. A peer without a certificate of the client authority never gets
past the handshake; who it is, is for `gateway.auth`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import grpc

from runtime.config import ConfigError, duration, optional_path, setting
from runtime.metrics import Metrics
from runtime.pki import load_certificate, server_problems

log = logging.getLogger(__name__)

MAX_FILE_BYTES: Final = 1024 * 1024


@dataclass(frozen=True)
class TlsConfig:
    """Mutual TLS."""

    certificate: Path | None = setting(
        "ATLASCO_TLS_CERTIFICATE",
        None,
        "The server's certificate chain in PEM; without it the port is plaintext.",
        parse=optional_path,
    )
    key: Path | None = setting(
        "ATLASCO_TLS_KEY", None, "The private key of that certificate, in PEM.", parse=optional_path
    )
    client_authority: Path | None = setting(
        "ATLASCO_TLS_CLIENT_CA",
        None,
        "The authorities whose client certificates are accepted, in PEM.",
        parse=optional_path,
    )
    trust_domain: str = setting("ATLASCO_TRUST_DOMAIN", "", "The SPIFFE trust domain of the clients' certificates.")
    reload_interval_s: float = setting(
        "ATLASCO_TLS_RELOAD_INTERVAL", 10.0, "How often the three files are read again.", parse=duration
    )

    def __post_init__(self) -> None:
        """Raises ValueError when only some of what mutual TLS needs is given."""
        given = {
            "ATLASCO_TLS_CERTIFICATE": self.certificate,
            "ATLASCO_TLS_KEY": self.key,
            "ATLASCO_TLS_CLIENT_CA": self.client_authority,
            "ATLASCO_TRUST_DOMAIN": self.trust_domain,
        }
        missing = [name for name, value in given.items() if not value]
        if missing and len(missing) < len(given):
            raise ValueError(f"mutual TLS needs all of {', '.join(given)}; missing: {', '.join(missing)}")
        if self.reload_interval_s <= 0:
            raise ValueError("ATLASCO_TLS_RELOAD_INTERVAL must be longer than 0s")

    @property
    def enabled(self) -> bool:
        """Whether mutual TLS is configured."""
        return self.certificate is not None


@dataclass(frozen=True)
class _Files:
    certificate: bytes
    key: bytes
    client_authority: bytes

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(self.key, self.certificate)], root_certificates=self.client_authority
        )


def _now() -> datetime:
    return datetime.now(UTC)


class ServerCertificates:
    """The certificates of a listening port, read again in the background from `open` to `close`."""

    def __init__(self, config: TlsConfig, metrics: Metrics, *, clock: Callable[[], datetime] = _now) -> None:
        """`config` must have mutual TLS enabled."""
        if config.certificate is None or config.key is None or config.client_authority is None:
            raise ValueError("mutual TLS is not configured")
        self._paths = (config.certificate, config.key, config.client_authority)
        self._interval_s = config.reload_interval_s
        self._metrics = metrics
        self._clock = clock
        self._served: _Files | None = None
        self._complaint: list[str] = []
        self._current: grpc.ServerCertificateConfiguration | None = None
        self._expires_at = 0.0
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Read the files and begin to watch them. Raises ConfigError when they cannot be used."""
        try:
            files = await asyncio.to_thread(self._read)
        except OSError as error:
            raise ConfigError([f"mutual TLS: {error}"]) from error
        problems = self._problems(files)
        if problems:
            paths = ", ".join(str(path) for path in self._paths)
            raise ConfigError(f"mutual TLS ({paths}): {problem}" for problem in problems)
        self._take(files)
        self._metrics.gauge("atlasco_tls_certificate_remaining_seconds", self._remaining_s)
        self._task = asyncio.get_running_loop().create_task(self._watch(), name="tls certificates")

    async def close(self) -> None:
        """Stop watching. What was served last stays."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for one listening port; make new ones for another. RuntimeError before `open`."""
        if self._current is None:
            raise RuntimeError("the certificates are not open")
        served: grpc.ServerCertificateConfiguration = self._current

        # Runs in a thread of the transport, under its lock, for every new connection: it may only look.
        # None means "no change"; any configuration makes the transport parse every certificate again.
        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            current = self._current
            if current is None or current is served:
                return None
            served = current
            return current

        return grpc.dynamic_ssl_server_credentials(
            served,
            fetch,  # type: ignore[arg-type]  # the stub has no None
            require_client_authentication=True,
        )

    async def reload(self) -> bool:
        """Read the files now; True when what they hold is new and served from here on.

        Never raises for a bad file.
        """
        try:
            files: _Files | None = await asyncio.to_thread(self._read)
        except OSError as error:
            files, problems = None, [str(error)]
        # Compared by content: times and inodes differ between a copy, a rename and a mounted secret.
        if files == self._served:
            self._complaint = []
            return False
        if files is not None:
            problems = self._problems(files)
            if not problems:
                self._take(files)
                self._metrics.count("atlasco_tls_reloads", result="loaded")
                return True
        # Looked at every time, for a certificate can be too new today; complained of once.
        if problems != self._complaint:
            self._complaint = problems
            self._metrics.count("atlasco_tls_reloads", result="failed")
            log.error("new TLS files are not used; the old certificate stays", extra={"problems": problems})
        return False

    def _read(self) -> _Files:
        certificate, key, authority = (_read_bounded(path) for path in self._paths)
        return _Files(certificate, key, authority)

    def _problems(self, files: _Files) -> list[str]:
        return server_problems(files.certificate, files.key, files.client_authority, self._clock())

    def _take(self, files: _Files) -> None:
        certificate = load_certificate(files.certificate)
        self._served = files
        self._complaint = []
        self._expires_at = certificate.not_valid_after_utc.timestamp()
        self._current = files.configuration()
        extra = {
            "serial": f"{certificate.serial_number:x}",
            "expires": certificate.not_valid_after_utc.isoformat(),
        }
        log.info("TLS certificate served", extra=extra)

    def _remaining_s(self) -> float:
        return self._expires_at - self._clock().timestamp()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.reload()
            except Exception:
                # The watch must outlive a surprise: without it the certificate would expire in silence.
                log.exception("TLS files could not be checked")


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(f"{path} is larger than {MAX_FILE_BYTES} bytes; it is no certificate")
    return content
