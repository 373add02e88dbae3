"""How an error reaches the peer: one reason, one gRPC status, said in one place.

Whatever ends a call is a `Refusal` in the end: a handler raises one, or `refusal_of` finds the one that
stands for another error. The peer gets the gRPC code, a text for people, and google.rpc.ErrorInfo with
the reason for programs; RetryInfo where trying again after a delay helps; BadRequest where one field is
at fault.

A rejected reading is not an error of the call: it is an answer (see Ack.rejections), and none of its
reasons is here.
"""

import enum
import logging
from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final, Never

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from storage.errors import QueryCanceled, StorageUnavailable, TransactionConflict

log = logging.getLogger(__name__)

DOMAIN: Final = "telemetry.atlasco"
"""ErrorInfo.domain of every error."""

# Trailers beyond 8 KiB are dropped by some peers' transports, and with them the status itself.
MAX_TEXT: Final = 500
MAX_METADATA_VALUE: Final = 256


class Reason(enum.StrEnum):
    """ErrorInfo.reason: why a call ended. The names are part of the protocol and never change."""

    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    HELLO_INVALID = "HELLO_INVALID"
    HELLO_REQUIRED = "HELLO_REQUIRED"
    HELLO_REPEATED = "HELLO_REPEATED"
    PROTOCOL_UNSUPPORTED = "PROTOCOL_UNSUPPORTED"
    HELLO_TIMEOUT = "HELLO_TIMEOUT"
    SEQUENCE_GAP = "SEQUENCE_GAP"
    SEQUENCE_INVALID = "SEQUENCE_INVALID"
    STREAM_SUPERSEDED = "STREAM_SUPERSEDED"
    DEVICE_MISMATCH = "DEVICE_MISMATCH"
    DEVICE_UNKNOWN = "DEVICE_UNKNOWN"
    SLOW_READER = "SLOW_READER"
    UNCONFIRMED_REJECTIONS = "UNCONFIRMED_REJECTIONS"

    REQUEST_INVALID = "REQUEST_INVALID"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    OVERLOADED = "OVERLOADED"

    FIELD_INVALID = "FIELD_INVALID"
    PAGE_TOKEN_INVALID = "PAGE_TOKEN_INVALID"  # noqa: S105 - no password
    RANGE_INVERTED = "RANGE_INVERTED"
    RANGE_UNBOUNDED = "RANGE_UNBOUNDED"
    ENTITY_NOT_FOUND = "ENTITY_NOT_FOUND"
    ENTITY_REPLACED = "ENTITY_REPLACED"
    ATTRIBUTE_NOT_FOUND = "ATTRIBUTE_NOT_FOUND"
    LATEST_NOT_KEPT = "LATEST_NOT_KEPT"
    QUERY_DEADLINE = "QUERY_DEADLINE"
    QUERY_CONCURRENCY = "QUERY_CONCURRENCY"
    EXPORT_CONCURRENCY = "EXPORT_CONCURRENCY"
    FRESHNESS_INVALID = "FRESHNESS_INVALID"
    FILTER_INVALID = "FILTER_INVALID"
    TIME_ZONE_UNKNOWN = "TIME_ZONE_UNKNOWN"
    AGGREGATE_TYPE = "AGGREGATE_TYPE"
    TOO_MANY_POINTS = "TOO_MANY_POINTS"
    TOO_MUCH_TEXT = "TOO_MUCH_TEXT"
    FRESHNESS_UNMET = "FRESHNESS_UNMET"
    READ_TOKEN_UNKNOWN = "READ_TOKEN_UNKNOWN"  # noqa: S105 - no password
    RANGE_RETIRED = "RANGE_RETIRED"
    FALLBACK_CONCURRENCY = "FALLBACK_CONCURRENCY"

    ROLLUP_NOT_FOUND = "ROLLUP_NOT_FOUND"
    PROJECTION_NOT_FOUND = "PROJECTION_NOT_FOUND"
    OPERATION_NOT_FOUND = "OPERATION_NOT_FOUND"
    ROLLUP_EXISTS = "ROLLUP_EXISTS"
    PROJECTION_EXISTS = "PROJECTION_EXISTS"
    SERVICE_REQUIRED = "SERVICE_REQUIRED"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"

    IDENTITY_MISSING = "IDENTITY_MISSING"
    IDENTITY_AMBIGUOUS = "IDENTITY_AMBIGUOUS"
    IDENTITY_MALFORMED = "IDENTITY_MALFORMED"
    TRUST_DOMAIN_FOREIGN = "TRUST_DOMAIN_FOREIGN"
    CREDENTIAL_EXPIRED = "CREDENTIAL_EXPIRED"
    CREDENTIAL_REVOKED = "CREDENTIAL_REVOKED"

    STORAGE_UNAVAILABLE = "STORAGE_UNAVAILABLE"
    GATEWAY_STOPPING = "GATEWAY_STOPPING"
    INTERNAL = "INTERNAL"


CODES: Final[Mapping[Reason, grpc.StatusCode]] = MappingProxyType(
    {
        # How a stream ends (ingest.proto).
        Reason.MALFORMED_MESSAGE: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.HELLO_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.HELLO_REQUIRED: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.HELLO_REPEATED: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.PROTOCOL_UNSUPPORTED: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.HELLO_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
        Reason.SEQUENCE_GAP: grpc.StatusCode.OUT_OF_RANGE,
        Reason.SEQUENCE_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.STREAM_SUPERSEDED: grpc.StatusCode.ABORTED,
        Reason.DEVICE_MISMATCH: grpc.StatusCode.PERMISSION_DENIED,
        Reason.DEVICE_UNKNOWN: grpc.StatusCode.PERMISSION_DENIED,
        Reason.SLOW_READER: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.UNCONFIRMED_REJECTIONS: grpc.StatusCode.RESOURCE_EXHAUSTED,
        # WriteBatch (ingest.proto).
        Reason.REQUEST_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.REQUEST_ID_REUSED: grpc.StatusCode.ALREADY_EXISTS,
        Reason.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
        # Queries (query.proto).
        Reason.FIELD_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.PAGE_TOKEN_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.RANGE_INVERTED: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.RANGE_UNBOUNDED: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.ENTITY_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.ENTITY_REPLACED: grpc.StatusCode.ABORTED,
        Reason.ATTRIBUTE_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.LATEST_NOT_KEPT: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.QUERY_DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
        Reason.QUERY_CONCURRENCY: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.EXPORT_CONCURRENCY: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.FRESHNESS_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.FILTER_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.TIME_ZONE_UNKNOWN: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.AGGREGATE_TYPE: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.TOO_MANY_POINTS: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.TOO_MUCH_TEXT: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.FRESHNESS_UNMET: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.READ_TOKEN_UNKNOWN: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.RANGE_RETIRED: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.FALLBACK_CONCURRENCY: grpc.StatusCode.RESOURCE_EXHAUSTED,
        # Administration (admin.proto).
        Reason.ROLLUP_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.PROJECTION_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.OPERATION_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.ROLLUP_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
        Reason.PROJECTION_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
        Reason.SERVICE_REQUIRED: grpc.StatusCode.PERMISSION_DENIED,
        Reason.QUOTA_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
        # Who calls (every service).
        Reason.IDENTITY_MISSING: grpc.StatusCode.UNAUTHENTICATED,
        Reason.IDENTITY_AMBIGUOUS: grpc.StatusCode.UNAUTHENTICATED,
        Reason.IDENTITY_MALFORMED: grpc.StatusCode.UNAUTHENTICATED,
        Reason.TRUST_DOMAIN_FOREIGN: grpc.StatusCode.UNAUTHENTICATED,
        Reason.CREDENTIAL_EXPIRED: grpc.StatusCode.UNAUTHENTICATED,
        Reason.CREDENTIAL_REVOKED: grpc.StatusCode.UNAUTHENTICATED,
        # The platform's own trouble (every service).
        Reason.STORAGE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
        Reason.GATEWAY_STOPPING: grpc.StatusCode.UNAVAILABLE,
        Reason.INTERNAL: grpc.StatusCode.INTERNAL,
    }
)


class Refusal(Exception):
    """The one exception by which a handler ends a call. Do not change it once raised.

    `reason` decides the code. `metadata` is for programs (ErrorInfo.metadata), `retry_after_s` becomes
    RetryInfo, `field` (a path such as devices[2].device_id) becomes a BadRequest violation and the
    metadata "field".
    """

    def __init__(
        self,
        reason: Reason,
        text: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text
        self.field = field
        self.retry_after_s = retry_after_s
        given = dict(metadata or {})
        if field is not None:
            given.setdefault("field", field)
        self.metadata: Mapping[str, str] = MappingProxyType(given)

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code of the reason."""
        return CODES[self.reason]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reason}, {self.text!r})"


def protocol_unsupported(version: int, supported: str) -> Refusal:
    """Hello names a version this server does not speak; `supported` is such as "1"."""
    text = f"protocol version {version} is not supported; supported: {supported}"
    return Refusal(Reason.PROTOCOL_UNSUPPORTED, text, metadata={"supported": supported})


def sequence_gap(expected: int, received: int) -> Refusal:
    """A message is missing before the one received."""
    text = f"message {received} came where {expected} was expected; reconnect and resume"
    return Refusal(Reason.SEQUENCE_GAP, text, metadata={"expected": str(expected)})


def stream_superseded() -> Refusal:
    """A newer stream of the same device took over."""
    text = "a newer stream of this device has taken over; another copy of this client seems to run"
    return Refusal(Reason.STREAM_SUPERSEDED, text)


def device_mismatch(named: str) -> Refusal:
    """A device identity named another device."""
    return Refusal(Reason.DEVICE_MISMATCH, f"this identity may not name device {named!r}")


def field_invalid(field: str, problem: str, reason: Reason = Reason.FIELD_INVALID) -> Refusal:
    """A field of a request is out of bounds; `problem` reads on after the field's path: "must be
    positive".
    """
    return Refusal(reason, f"{field} {problem}", field=field)


def entity_not_found(entity: str) -> Refusal:
    """The tenant has no such device."""
    return Refusal(Reason.ENTITY_NOT_FOUND, f"the tenant has no device named {entity!r}", metadata={"entity": entity})


def entity_replaced(entity: str) -> Refusal:
    """Pages of series do not go on: the device in which the last one ended is another one now."""
    text = f"device {entity!r} was deleted and registered anew since the last page; start again from the beginning"
    return Refusal(Reason.ENTITY_REPLACED, text, metadata={"entity": entity})


def attribute_not_found(attribute: str) -> Refusal:
    """The tenant has no such attribute."""
    text = f"the tenant has no attribute named {attribute!r}"
    return Refusal(Reason.ATTRIBUTE_NOT_FOUND, text, metadata={"attribute": attribute})


def latest_not_kept(attribute: str) -> Refusal:
    """The attribute opted out of latest values."""
    text = f"attribute {attribute!r} keeps no latest value; read its series instead"
    return Refusal(Reason.LATEST_NOT_KEPT, text, metadata={"attribute": attribute})


def overloaded(text: str, retry_after_s: float) -> Refusal:
    """A unary write found a queue full; the same request may come again after the delay."""
    return Refusal(Reason.OVERLOADED, text, retry_after_s=retry_after_s)


def storage_unavailable(retry_after_s: float = 1.0) -> Refusal:
    """The database does not answer at present."""
    return Refusal(Reason.STORAGE_UNAVAILABLE, "the database does not answer; try again", retry_after_s=retry_after_s)


def refusal_of(error: BaseException) -> Refusal:
    """The refusal that stands for `error`; INTERNAL, without a word of its text, for an error nobody
    foresaw.

    A foreign error's text is for the log alone: it may hold SQL, addresses or another tenant's data.
    """
    match error:
        case Refusal():
            return error
        case StorageUnavailable() | TransactionConflict():
            return storage_unavailable()
        case QueryCanceled():
            return Refusal(Reason.QUERY_DEADLINE, "the query was not done in time; ask for less, or page")
        case _:
            return Refusal(Reason.INTERNAL, "an internal error; the gateway's log has it")


def to_status(refusal: Refusal) -> grpc.Status:
    """The refusal as a rich gRPC status, its details within what transports carry."""
    info = error_details_pb2.ErrorInfo(
        reason=refusal.reason,
        domain=DOMAIN,
        metadata={key: _cut(value, MAX_METADATA_VALUE) for key, value in refusal.metadata.items()},
    )
    text = _cut(refusal.text, MAX_TEXT)
    status = status_pb2.Status(code=refusal.code.value[0], message=text, details=[_any(info)])
    if refusal.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromTimedelta(timedelta(seconds=max(0.0, refusal.retry_after_s)))
        status.details.append(_any(error_details_pb2.RetryInfo(retry_delay=delay)))
    if refusal.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(refusal.field, MAX_METADATA_VALUE), description=text
        )
        status.details.append(_any(error_details_pb2.BadRequest(field_violations=[violation])))
    return rpc_status.to_status(status)


async def abort(context: grpc.aio.ServicerContext[Any, Any], failure: BaseException) -> Never:
    """End the call with the status that `failure` stands for; an error nobody foresaw is logged here, once.

    Raises what grpc.aio raises to unwind the handler. A handler's CancelledError is not for here: let it
    pass.
    """
    refusal = refusal_of(failure)
    if refusal.reason is Reason.INTERNAL:
        log.error("call failed", exc_info=failure)
    await context.abort_with_status(to_status(refusal))


def _any(
    message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo | error_details_pb2.BadRequest,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _cut(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8; a lone surrogate, which has none, is replaced."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: limit - 3].decode("utf-8", "ignore") + "…"
