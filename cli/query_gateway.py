"""The gateway that `atlasco query` asks: the connection, who asks, how answers came about, what errors mean."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any, cast

import grpc
from atlasco.telemetry.v1 import query_pb2, query_pb2_grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from cli.query_arguments import BadArgument, freshness_of
from cli.times import time_text
from gateway.auth import encode_name

LIST_PAGE = 1_000
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

HINTS = {
    "ENTITY_NOT_FOUND": "`atlasco query devices` lists them",
    "ATTRIBUTE_NOT_FOUND": "`atlasco query attributes` lists them",
    "LATEST_NOT_KEPT": "`atlasco query series` reads its history",
    "ENTITY_REPLACED": "ask again from the beginning",
    "QUERY_DEADLINE": "ask for a shorter range, or give it more time with --timeout",
    "QUERY_CONCURRENCY": "try again in a moment",
    "EXPORT_CONCURRENCY": "try again in a moment",
    "FALLBACK_CONCURRENCY": "try again in a moment, or with --freshness critical",
    "FRESHNESS_UNMET": "`atlasco query freshness` says how fresh each is; --allow-degraded takes an older answer",
    "RANGE_RETIRED": "these readings are past the tenant's retention",
    "IDENTITY_MISSING": "name the tenant with --tenant, or give --ca, --cert and --key",
}


class Gateway:
    """The query service with this command's identity and timeout on every call."""

    def __init__(self, channel: grpc.Channel, arguments: argparse.Namespace) -> None:
        self._stub = query_pb2_grpc.QueryServiceStub(channel)
        self._metadata = [] if arguments.ca else _development_identity(arguments.tenant)
        self._timeout_s = arguments.timeout
        self._freshness = freshness_of(arguments)
        self._known = ""

    def call(self, method: str, request: Any) -> Any:
        """The answer to one request. Raises grpc.RpcError."""
        if self._freshness is not None:
            request.freshness.CopyFrom(self._freshness)
        answer = getattr(self._stub, method)(request, timeout=self._timeout_s, metadata=self._metadata)
        if method not in ("GetFreshness", "ExportSeries"):
            self.tell(answer.provenance)
        return answer

    def tell(self, provenance: query_pb2.Provenance) -> None:
        """Say on stderr in which way an answer is worse than asked, and with --explain how it came about."""
        degraded = "; ".join(f"{_reason(d.reason)}: {d.text}" for d in provenance.degraded)
        if degraded and degraded != self._known:
            self._known = degraded
            print(f"degraded: {degraded}", file=sys.stderr)
        if self._freshness is not None and self._freshness.explain:
            for line in explanation(provenance):
                print(line, file=sys.stderr)

    def pages(self, method: str, request: Any) -> Iterator[Any]:
        """The answer's pages, one after the other."""
        while True:
            page = self.call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


def open_channel(arguments: argparse.Namespace) -> grpc.Channel:
    """The connection, plaintext without certificates.

    Raises:
        BadArgument: some of the files are missing, or one cannot be read.
    """
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # A question without a deadline must not wait for ever for a gateway that is gone without a word.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
    files = {"--ca": arguments.ca, "--cert": arguments.cert, "--key": arguments.key}
    missing = [flag for flag, path in files.items() if path is None]
    if len(missing) == len(files):
        return grpc.insecure_channel(arguments.target, options)
    if missing:
        raise BadArgument(f"--ca, --cert and --key go together; {' and '.join(missing)} is missing")
    contents = []
    for flag, path in files.items():
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            raise BadArgument(f"{flag} {path}: {error.strerror}") from None
    ca, cert, key = contents
    return grpc.secure_channel(
        arguments.target,
        grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert),
        options,
    )


def _development_identity(tenant: str | None) -> list[tuple[str, str]]:
    if tenant is None:
        raise BadArgument("name the tenant with --tenant or ATLASCO_TENANT, or give --ca, --cert and --key")
    return [("atlasco-tenant", encode_name(tenant)), ("atlasco-service", "atlasco-cli")]


def explanation(provenance: query_pb2.Provenance) -> Iterator[str]:
    """How an answer came about, line by line."""
    yield (
        f"answered by {source_name(provenance.source)}, complete to {time_text(provenance.as_of_us)}, "
        f"at most {provenance.staleness_us / 1000:.1f} ms old"
    )
    for candidate in provenance.plan.candidates:
        yield f"  {'*' if candidate.chosen else ' '} {candidate.name}: {candidate.reason}"
    for step in provenance.plan.steps:
        outcome = f"failed: {step.failure}" if step.failure else "answered"
        yield f"  {step.name} {outcome} in {step.duration_us / 1000:.1f} ms"


def source_name(source: "query_pb2.Provenance.Source.ValueType") -> str:
    """The name of a source as the command shows it."""
    if not source:
        return "none"
    return query_pb2.Provenance.Source.Name(source).removeprefix("SOURCE_").lower()


def _reason(reason: "query_pb2.Degradation.Reason.ValueType") -> str:
    return query_pb2.Degradation.Reason.Name(reason).removeprefix("REASON_")


def failure(error: grpc.RpcError, target: str) -> tuple[str, int]:
    """What an error means, in words, and the exit code for it."""
    # What a blocking call raises is a grpc.Call too; the types do not say so.
    status = rpc_status.from_call(cast(grpc.Call, error))
    code, text = error.code().name, error.details() or ""
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            hint = f" ({HINTS[info.reason]})" if info.reason in HINTS else ""
            return f"{info.reason}: {text}{hint}", 3 if info.reason == "STORAGE_UNAVAILABLE" else 1
    if code == "UNAVAILABLE":
        return (
            f"no gateway answers at {target}: {text} (`make demo` or `atlasco serve` starts one; --target names it)",
            3,
        )
    # A deadline that the gateway did not tell of in time.
    hint = f" ({HINTS['QUERY_DEADLINE']})" if code == "DEADLINE_EXCEEDED" else ""
    return f"{code}: {text}{hint}", 1
