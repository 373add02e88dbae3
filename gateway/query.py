"""The QueryService: who asks, what may be asked, the read, the message. The specification is query.proto."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeAlias, TypeVar

import grpc
from atlasco.telemetry.v1 import query_pb2, query_pb2_grpc

from gateway.auth import Authenticator, Identity
from gateway.paging import PageTokens, pack_position, token_invalid, unpack_position
from gateway.query_admission import QueryAdmission
from gateway.query_messages import (
    attribute_messages,
    entity_latest,
    entity_messages,
    provenance,
    series_message,
)
from gateway.query_requests import (
    LIST_PAGE,
    SERIES_PAGE,
    entity_names,
    entity_type,
    labels,
    latest_attributes,
    one_entity,
    page_size,
    series_question,
    visible_entity,
)
from gateway.status import abort, attribute_not_found, entity_not_found, field_invalid, latest_not_kept, refusal_of
from runtime.metrics import Metrics
from storage.read_model import AnswerTooLarge, AttributeNotFound, EntityNotFound, LatestNotKept
from storage.reads import TelemetryReads

Answer = TypeVar("Answer")
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class QueryLimits:
    """Bounds of the service. Times in seconds."""

    # Queries at once, running on a connection or waiting for one. Small reads take milliseconds: a short queue evens
    # out a burst; a long one would only make everybody late.
    concurrency: int = 64
    # Queries of one tenant at once.
    tenant_concurrency: int = 48
    # The most a query may take, whatever deadline the caller sets.
    longest_s: float = 30.0
    # Kept back from the caller's deadline, though at most a fifth of it, so that the statement is over and the typed
    # error has arrived before the caller gives up by itself.
    reserve_s: float = 0.25


class QueryServicer(query_pb2_grpc.QueryServiceServicer):
    """Answers queries over `reads`; `tokens` must have the same key on every gateway."""

    def __init__(
        self,
        reads: TelemetryReads,
        authenticator: Authenticator,
        metrics: Metrics,
        *,
        limits: QueryLimits | None = None,
        tokens: PageTokens | None = None,
    ) -> None:
        self._reads = reads
        self._authenticator = authenticator
        self._metrics = metrics
        self._limits = limits or QueryLimits()
        self._tokens = tokens or PageTokens()
        self._admission = QueryAdmission(self._limits.concurrency, self._limits.tenant_concurrency)

    async def GetLatest(  # noqa: N802 - the name in the protocol
        self, request: query_pb2.GetLatestRequest, context: Context
    ) -> query_pb2.GetLatestResponse:
        """See query.proto."""

        async def answer(identity: Identity, timeout_s: float) -> query_pb2.GetLatestResponse:
            entity = one_entity(identity, request.entity)
            found = await self._reads.latest(
                identity.tenant, [entity], latest_attributes(request.attributes), timeout_s=timeout_s
            )
            if found.missing:
                raise entity_not_found(entity)
            latest = entity_latest(entity, found.entities[entity], found.as_of_us)
            return query_pb2.GetLatestResponse(latest=latest, provenance=provenance(found.as_of_us))

        return await self._call("GetLatest", context, answer)

    async def BatchGetLatest(  # noqa: N802
        self, request: query_pb2.BatchGetLatestRequest, context: Context
    ) -> query_pb2.BatchGetLatestResponse:
        """See query.proto."""

        async def answer(identity: Identity, timeout_s: float) -> query_pb2.BatchGetLatestResponse:
            found = await self._reads.latest(
                identity.tenant,
                entity_names(identity, request.entities),
                latest_attributes(request.attributes),
                timeout_s=timeout_s,
            )
            return query_pb2.BatchGetLatestResponse(
                latest=[entity_latest(name, values, found.as_of_us) for name, values in found.entities.items()],
                not_found=found.missing,
                provenance=provenance(found.as_of_us),
            )

        return await self._call("BatchGetLatest", context, answer)

    async def ReadSeries(  # noqa: N802
        self, request: query_pb2.ReadSeriesRequest, context: Context
    ) -> query_pb2.ReadSeriesResponse:
        """See query.proto."""

        async def answer(identity: Identity, timeout_s: float) -> query_pb2.ReadSeriesResponse:
            question = series_question(identity, request)
            size = page_size(request.page_size, SERIES_PAGE)
            position = self._tokens.open(identity.tenant, request)
            page = await self._reads.series(
                identity.tenant,
                question,
                page_size=size,
                after=None if position is None else unpack_position(position),
                timeout_s=timeout_s,
            )
            token = "" if page.last is None else self._tokens.seal(pack_position(page.last), identity.tenant, request)
            return query_pb2.ReadSeriesResponse(
                series=[series_message(part) for part in page.parts],
                next_page_token=token,
                provenance=provenance(page.as_of_us),
            )

        return await self._call("ReadSeries", context, answer)

    async def ListEntities(  # noqa: N802
        self, request: query_pb2.ListEntitiesRequest, context: Context
    ) -> query_pb2.ListEntitiesResponse:
        """See query.proto."""

        async def answer(identity: Identity, timeout_s: float) -> query_pb2.ListEntitiesResponse:
            page = await self._reads.entities(
                identity.tenant,
                entity_type=entity_type(request.entity_type),
                labels=labels(request.labels),
                only=visible_entity(identity),
                page_size=page_size(request.page_size, LIST_PAGE),
                after=self._name_after(identity, request),
                timeout_s=timeout_s,
            )
            return query_pb2.ListEntitiesResponse(
                entities=entity_messages(page.entities),
                next_page_token=self._token_after(page.last, identity, request),
                provenance=provenance(page.as_of_us),
            )

        return await self._call("ListEntities", context, answer)

    async def ListAttributes(  # noqa: N802
        self, request: query_pb2.ListAttributesRequest, context: Context
    ) -> query_pb2.ListAttributesResponse:
        """See query.proto. A device sees its tenant's attributes too: they are definitions, not data."""

        async def answer(identity: Identity, timeout_s: float) -> query_pb2.ListAttributesResponse:
            page = await self._reads.attributes(
                identity.tenant,
                page_size=page_size(request.page_size, LIST_PAGE),
                after=self._name_after(identity, request),
                timeout_s=timeout_s,
            )
            return query_pb2.ListAttributesResponse(
                attributes=attribute_messages(page.attributes),
                next_page_token=self._token_after(page.last, identity, request),
                provenance=provenance(page.as_of_us),
            )

        return await self._call("ListAttributes", context, answer)

    async def _call(
        self, method: str, context: Context, answer: Callable[[Identity, float], Awaitable[Answer]]
    ) -> Answer:
        """Authenticate, admit, answer; errors become a status, and everything is counted."""
        started = perf_counter()
        status = grpc.StatusCode.CANCELLED
        try:
            identity = self._authenticator.authenticate(context)
            with self._admission.admitted(identity.tenant):
                made = await answer(identity, self._timeout_s(context))
            status = grpc.StatusCode.OK
            return made
        except Exception as error:  # the one place where errors end; cancellation is none of them
            failure = _refusal_of_read(error)
            status = refusal_of(failure).code
            await abort(context, failure)
        finally:
            self._metrics.count("atlasco_query_requests", method=method, status=status.name)
            self._metrics.observe("atlasco_query_duration_seconds", perf_counter() - started, method=method)

    def _timeout_s(self, context: Context) -> float:
        left_s = context.time_remaining()
        if left_s is None:
            return self._limits.longest_s
        return min(self._limits.longest_s, left_s - min(self._limits.reserve_s, left_s / 5))

    def _name_after(
        self, identity: Identity, request: query_pb2.ListEntitiesRequest | query_pb2.ListAttributesRequest
    ) -> str:
        position = self._tokens.open(identity.tenant, request)
        if position is None:
            return ""
        try:
            return position.decode()
        except UnicodeDecodeError:
            raise token_invalid() from None

    def _token_after(
        self,
        last: str | None,
        identity: Identity,
        request: query_pb2.ListEntitiesRequest | query_pb2.ListAttributesRequest,
    ) -> str:
        return "" if last is None else self._tokens.seal(last.encode(), identity.tenant, request)


def _refusal_of_read(error: Exception) -> Exception:
    """The refusal that a read's own error stands for; any other error as it is."""
    match error:
        case EntityNotFound():
            return entity_not_found(error.name)
        case AttributeNotFound():
            return attribute_not_found(error.name)
        case LatestNotKept():
            return latest_not_kept(error.name)
        case AnswerTooLarge():
            return field_invalid("attributes", f"lead to an answer that is too large: {error}")
        case _:
            return error
