"""The QueryService: authenticates, checks the request, reads through the router, answers. Specified in query.proto."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import grpc
from atlasco.telemetry.v1 import query_pb2, query_pb2_grpc
from opentelemetry.trace import Tracer

from gateway.auth import Authenticator, Identity
from gateway.paging import PagedRequest, PageTokens, pack_position, token_invalid, unpack_position
from gateway.query_admission import ExportAdmission, OpenExport, QueryAdmission
from gateway.query_aggregate import SELECTION_FILTER, aggregate_message, aggregate_question
from gateway.query_calls import Call, QueryCalls
from gateway.query_export import export_series
from gateway.query_freshness import TierBounds, provenance, source_messages, tier_message
from gateway.query_messages import attribute_messages, entity_latest, entity_messages, found_messages, series_message
from gateway.query_refusals import refusal_of_query
from gateway.query_requests import (
    EXPORT_CHUNK,
    LIST_PAGE,
    SERIES_PAGE,
    attribute_names,
    entity_names,
    entity_type,
    filter_text,
    labels,
    one_entity,
    page_size,
    series_question,
    visible_entity,
)
from gateway.slow_reader import ReaderWatch
from gateway.status import Refusal, abort, entity_not_found, refusal_of
from router.clock import PrimaryClock
from router.execute import Router
from router.outcome import Routed
from router.plan import Need
from router.questions import Aggregates, AttributeList, EntityList, FindDevices, LatestValues, SeriesRange
from runtime.metrics import Metrics
from storage.filter.search import FindQuestion
from storage.reads.model import SeriesPage, SeriesQuestion

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class QueryLimits:
    """Bounds of the service. Times in seconds."""

    # Queries that run at once, counting those that wait for a connection. Small reads take milliseconds: a short queue
    # absorbs a burst, a long one would only make every caller late.
    concurrency: int = 64
    # Queries of one tenant that run at once.
    tenant_concurrency: int = 48
    # Exports of one tenant that are open at once; each may hold a message that its client has not read yet.
    tenant_exports: int = 16
    # How long a client may leave a message of an export unread.
    export_patience_s: float = 60.0
    # The longest that a query may take, whatever deadline its caller sets; in an export, each read of a page.
    longest_s: float = 30.0
    # Subtracted from the time that the caller's deadline leaves (at most a fifth of it), so that the statement is
    # cancelled and the typed error has arrived before the caller gives up.
    reserve_s: float = 0.25
    tiers: TierBounds = field(default_factory=TierBounds)


class QueryServicer(query_pb2_grpc.QueryServiceServicer):
    """Answers queries through `router`; `tokens` must have the same key on every gateway. `tracer` gets a span for each
    query; None: tracing is off.
    """

    def __init__(
        self,
        router: Router,
        clock: PrimaryClock,
        authenticator: Authenticator,
        metrics: Metrics,
        *,
        limits: QueryLimits | None = None,
        tokens: PageTokens | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._router = router
        self._clock = clock
        self._authenticator = authenticator
        self._limits = limits or QueryLimits()
        self._tiers: Mapping[query_pb2.Tier.ValueType, int] = self._limits.tiers.microseconds()
        self._calls = QueryCalls(router, self._tiers, metrics, tracer)
        self._tokens = tokens or PageTokens()
        self._admission = QueryAdmission(self._limits.concurrency, self._limits.tenant_concurrency)
        self._exports = ExportAdmission(self._limits.tenant_exports)
        self._metrics = metrics
        metrics.gauge("atlasco_exports_open", lambda: self._exports.open)

    async def GetLatest(  # noqa: N802 - the name in the protocol
        self, request: query_pb2.GetLatestRequest, context: Context
    ) -> query_pb2.GetLatestResponse:
        """See query.proto."""

        async def answer(identity: Identity, call: Call) -> query_pb2.GetLatestResponse:
            entity = one_entity(identity, request.entity)
            question = LatestValues([entity], attribute_names(request.attributes))
            routed = await call.read(identity.tenant, question, request.freshness)
            if routed.answer.missing:
                raise entity_not_found(entity)
            latest = entity_latest(entity, routed.answer.entities[entity], routed.proof.as_of_us)
            return query_pb2.GetLatestResponse(latest=latest, provenance=provenance(routed))

        return await self._call("GetLatest", context, answer)

    async def BatchGetLatest(  # noqa: N802
        self, request: query_pb2.BatchGetLatestRequest, context: Context
    ) -> query_pb2.BatchGetLatestResponse:
        """See query.proto."""

        async def answer(identity: Identity, call: Call) -> query_pb2.BatchGetLatestResponse:
            question = LatestValues(entity_names(identity, request.entities), attribute_names(request.attributes))
            routed = await call.read(identity.tenant, question, request.freshness)
            as_of_us = routed.proof.as_of_us
            return query_pb2.BatchGetLatestResponse(
                latest=[entity_latest(name, values, as_of_us) for name, values in routed.answer.entities.items()],
                not_found=routed.answer.missing,
                provenance=provenance(routed),
            )

        return await self._call("BatchGetLatest", context, answer)

    async def ReadSeries(  # noqa: N802
        self, request: query_pb2.ReadSeriesRequest, context: Context
    ) -> query_pb2.ReadSeriesResponse:
        """See query.proto."""

        async def answer(identity: Identity, call: Call) -> query_pb2.ReadSeriesResponse:
            series = series_question(identity, request)
            size = page_size(request.page_size, SERIES_PAGE)
            after = self._tokens.open(identity.tenant, request)
            question = SeriesRange(series, size, None if after is None else unpack_position(after))
            routed = await call.read(identity.tenant, question, request.freshness)
            last = routed.answer.last
            token = "" if last is None else self._tokens.seal(pack_position(last), identity.tenant, request)
            return query_pb2.ReadSeriesResponse(
                series=[series_message(part) for part in routed.answer.parts],
                next_page_token=token,
                provenance=provenance(routed),
            )

        return await self._call("ReadSeries", context, answer)

    async def ExportSeries(  # noqa: N802
        self, request: query_pb2.ExportSeriesRequest, context: Context
    ) -> AsyncIterator[query_pb2.ExportSeriesResponse]:
        """See query.proto. An export counts as a query only while it reads a page, not while its client reads."""
        with self._calls.call("ExportSeries", context, lambda: self._timeout_s(context)) as call:
            try:
                identity = self._authenticator.authenticate(context)
                question = series_question(identity, request)
                chunk = page_size(request.chunk_size, EXPORT_CHUNK, "chunk_size")

                async def read(page: SeriesRange) -> Routed[SeriesPage]:
                    # The first page is refused at once, as any query. Refusing a later page would abort an export
                    # that is half sent: it waits for its turn.
                    patience_s = 0.0 if page.is_first else self._timeout_s(context)
                    async with self._admission.admitted_in_turn(identity.tenant, patience_s):
                        return await call.read(identity.tenant, page, request.freshness)

                with self._exports.admitted(identity.tenant) as export:
                    reader = self._watch_reader(identity.tenant, export, call)
                    async for message in export_series(read, question, chunk):
                        with reader.writing():
                            yield message
                call.done()
            except Exception as error:  # as in _call
                failure = refusal_of_query(error)
                call.refused(refusal_of(failure))
                await abort(context, failure)

    def _watch_reader(self, tenant: str, export: OpenExport, call: Call) -> ReaderWatch:
        def gave_up(refusal: Refusal) -> None:
            log.info("a client does not read its export", extra={"tenant": tenant})
            self._metrics.count("atlasco_exports_unread")
            export.abandon()
            call.refused(refusal)

        return ReaderWatch(self._limits.export_patience_s, gave_up)

    async def Aggregate(  # noqa: N802
        self, request: query_pb2.AggregateRequest, context: Context
    ) -> query_pb2.AggregateResponse:
        """See query.proto."""

        async def answer(identity: Identity, call: Call) -> query_pb2.AggregateResponse:
            question = Aggregates(aggregate_question(identity, request), visible_entity(identity))
            routed = await call.read(identity.tenant, question, request.freshness)
            return query_pb2.AggregateResponse(series=aggregate_message(routed.answer), provenance=provenance(routed))

        return await self._call("Aggregate", context, answer, filter_field=SELECTION_FILTER)

    async def FindEntities(  # noqa: N802
        self, request: query_pb2.FindEntitiesRequest, context: Context
    ) -> query_pb2.FindEntitiesResponse:
        """See query.proto."""

        async def answer(identity: Identity, call: Call) -> query_pb2.FindEntitiesResponse:
            question = FindDevices(
                FindQuestion(
                    filter_text(request.filter),
                    attribute_names(request.attributes),
                    visible_entity(identity),
                ),
                page_size(request.page_size, LIST_PAGE),
                self._name_after(identity, request),
            )
            routed = await call.read(identity.tenant, question, request.freshness)
            return query_pb2.FindEntitiesResponse(
                entities=found_messages(routed.answer.devices, routed.proof.as_of_us),
                next_page_token=self._token_after(routed.answer.last, identity, request),
                provenance=provenance(routed),
            )

        return await self._call("FindEntities", context, answer)

    async def ListEntities(  # noqa: N802
        self, request: query_pb2.ListEntitiesRequest, context: Context
    ) -> query_pb2.ListEntitiesResponse:
        """See query.proto."""

        async def answer(identity: Identity, call: Call) -> query_pb2.ListEntitiesResponse:
            question = EntityList(
                page_size=page_size(request.page_size, LIST_PAGE),
                entity_type=entity_type(request.entity_type),
                labels=labels(request.labels),
                only=visible_entity(identity),
                after=self._name_after(identity, request),
            )
            routed = await call.read(identity.tenant, question, request.freshness)
            return query_pb2.ListEntitiesResponse(
                entities=entity_messages(routed.answer.entities),
                next_page_token=self._token_after(routed.answer.last, identity, request),
                provenance=provenance(routed),
            )

        return await self._call("ListEntities", context, answer)

    async def ListAttributes(  # noqa: N802
        self, request: query_pb2.ListAttributesRequest, context: Context
    ) -> query_pb2.ListAttributesResponse:
        """See query.proto. A device sees its tenant's attributes too: they are definitions, not data."""

        async def answer(identity: Identity, call: Call) -> query_pb2.ListAttributesResponse:
            question = AttributeList(page_size(request.page_size, LIST_PAGE), self._name_after(identity, request))
            routed = await call.read(identity.tenant, question, request.freshness)
            return query_pb2.ListAttributesResponse(
                attributes=attribute_messages(routed.answer.attributes),
                next_page_token=self._token_after(routed.answer.last, identity, request),
                provenance=provenance(routed),
            )

        return await self._call("ListAttributes", context, answer)

    async def GetFreshness(  # noqa: N802
        self, request: query_pb2.GetFreshnessRequest, context: Context
    ) -> query_pb2.GetFreshnessResponse:
        """See query.proto. Reads no source: it reports what the gateway measures continuously."""

        async def answer(_: Identity, __: Call) -> query_pb2.GetFreshnessResponse:
            now = self._clock.now()
            end_us = 0 if now is None else now.latest_us
            start_us = end_us - self._router.policy.long_range_us
            scan = SeriesRange(SeriesQuestion(["-"], ["-"], start_us, end_us), 1, None)
            lookup = LatestValues(["-"], ["-"])
            return query_pb2.GetFreshnessResponse(
                time_us=end_us,
                uncertainty_us=0 if now is None else now.uncertainty_us,
                sources=source_messages(self._router.standings(), now),
                tiers=[
                    tier_message(
                        tier,
                        staleness_us,
                        self._router.plan(scan, Need(staleness_us), now),
                        self._router.plan(lookup, Need(staleness_us), now),
                    )
                    for tier, staleness_us in self._tiers.items()
                ],
            )

        return await self._call("GetFreshness", context, answer)

    async def _call(
        self,
        method: str,
        context: Context,
        answer: Callable[[Identity, Call], Awaitable[Answer]],
        *,
        filter_field: str = "filter",
    ) -> Answer:
        """Authenticate, admit, answer. Every error becomes a status here; `filter_field`: see `refusal_of_query`."""
        with self._calls.call(method, context, lambda: self._timeout_s(context)) as call:
            try:
                identity = self._authenticator.authenticate(context)
                with self._admission.admitted(identity.tenant):
                    made = await answer(identity, call)
                call.done()
                return made
            except Exception as error:  # a CancelledError is no Exception, and passes
                failure = refusal_of_query(error, filter_field=filter_field)
                call.refused(refusal_of(failure))
                await abort(context, failure)

    def _timeout_s(self, context: Context) -> float:
        left_s = context.time_remaining()
        if left_s is None:
            return self._limits.longest_s
        return min(self._limits.longest_s, left_s - min(self._limits.reserve_s, left_s / 5))

    def _name_after(self, identity: Identity, request: PagedRequest) -> str:
        position = self._tokens.open(identity.tenant, request)
        if position is None:
            return ""
        try:
            return position.decode()
        except UnicodeDecodeError:
            raise token_invalid() from None

    def _token_after(self, last: str | None, identity: Identity, request: PagedRequest) -> str:
        return "" if last is None else self._tokens.seal(last.encode(), identity.tenant, request)
