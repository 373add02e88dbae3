"""The AdminService: what a tenant declares about its data, and what it removes. The specification is admin.proto."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, Final, TypeAlias, TypeVar
from uuid import UUID

import grpc
from atlasco.telemetry.v1 import admin_pb2, admin_pb2_grpc

from gateway.auth import Authenticator, Identity, IdentityKind
from gateway.paging import PageTokens, token_invalid
from gateway.query_refusals import refusal_of_query
from gateway.query_requests import LIST_PAGE, entity_type, one_entity, page_size
from gateway.status import Reason, Refusal, abort, field_invalid
from storage.database import Pool
from storage.deletion import (
    Operation,
    OperationConflict,
    OperationNotFound,
    find_operation,
    list_operations,
    order_deletion,
)
from storage.registry import Registry
from storage.rollup.declare import (
    DeclarationExists,
    DeclarationInvalid,
    DeclarationNotFound,
    DeclarationQuota,
    NotNumeric,
    ProjectionEntry,
    RollupEntry,
    Status,
    create_projection,
    create_rollup,
    drop_projection,
    drop_rollup,
    find_projection,
    find_rollup,
    list_projections,
    list_rollups,
)
from storage.times import microseconds, moment

Answer = TypeVar("Answer")
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_NO_TENANT: Final = -1
# The end of the year 9999, the latest that a datetime can hold.
_MAX_TIME_US: Final = 253_402_300_799_999_999

_STATES: Final = {
    "pending": admin_pb2.MATERIALIZATION_STATE_PENDING,
    "backfilling": admin_pb2.MATERIALIZATION_STATE_BACKFILLING,
    "serving": admin_pb2.MATERIALIZATION_STATE_SERVING,
    "failed": admin_pb2.MATERIALIZATION_STATE_FAILED,
    "dropping": admin_pb2.MATERIALIZATION_STATE_DROPPING,
}
_STEPS: Final = {
    "database": admin_pb2.Operation.STEP_DATABASE,
    "settle": admin_pb2.Operation.STEP_DATABASE,
    "materializations": admin_pb2.Operation.STEP_MATERIALIZATIONS,
    "warehouse": admin_pb2.Operation.STEP_WAREHOUSE,
    "done": admin_pb2.Operation.STEP_DONE,
}


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Carries out a tenant's declarations and deletions; `pool` is of the ingest role."""

    def __init__(
        self, pool: Pool, registry: Registry, authenticator: Authenticator, *, tokens: PageTokens | None = None
    ) -> None:
        self._pool = pool
        self._registry = registry
        self._authenticator = authenticator
        self._tokens = tokens or PageTokens()

    async def CreateRollup(  # noqa: N802 - the names in the protocol
        self, request: admin_pb2.CreateRollupRequest, context: Context
    ) -> admin_pb2.CreateRollupResponse:
        """See admin.proto."""
        wanted = request.rollup

        async def answer(_: Identity, tenant: int) -> admin_pb2.CreateRollupResponse:
            from_us = wanted.backfill_from_us
            if not 0 <= from_us <= _MAX_TIME_US:
                raise field_invalid("rollup.backfill_from_us", "is not a valid time of a reading")
            since = moment(from_us) if from_us else None
            made = await create_rollup(self._pool, tenant, wanted.name, wanted.attributes, since)
            return admin_pb2.CreateRollupResponse(rollup=_rollup(made))

        return await self._call(context, answer, "rollup", wanted.name)

    async def GetRollup(  # noqa: N802
        self, request: admin_pb2.GetRollupRequest, context: Context
    ) -> admin_pb2.GetRollupResponse:
        """See admin.proto."""

        async def answer(_: Identity, tenant: int) -> admin_pb2.GetRollupResponse:
            return admin_pb2.GetRollupResponse(rollup=_rollup(await find_rollup(self._pool, tenant, request.name)))

        return await self._call(context, answer, "rollup", request.name)

    async def ListRollups(  # noqa: N802
        self, request: admin_pb2.ListRollupsRequest, context: Context
    ) -> admin_pb2.ListRollupsResponse:
        """See admin.proto."""

        async def answer(_: Identity, tenant: int) -> admin_pb2.ListRollupsResponse:
            return admin_pb2.ListRollupsResponse(rollups=map(_rollup, await list_rollups(self._pool, tenant)))

        return await self._call(context, answer)

    async def DropRollup(  # noqa: N802
        self, request: admin_pb2.DropRollupRequest, context: Context
    ) -> admin_pb2.DropRollupResponse:
        """See admin.proto."""

        async def answer(_: Identity, tenant: int) -> admin_pb2.DropRollupResponse:
            await drop_rollup(self._pool, tenant, request.name)
            return admin_pb2.DropRollupResponse()

        return await self._call(context, answer, "rollup", request.name)

    async def CreateProjection(  # noqa: N802
        self, request: admin_pb2.CreateProjectionRequest, context: Context
    ) -> admin_pb2.CreateProjectionResponse:
        """See admin.proto."""
        wanted = request.projection

        async def answer(_: Identity, tenant: int) -> admin_pb2.CreateProjectionResponse:
            kind = entity_type(wanted.entity_type, "projection.entity_type")
            made = await create_projection(self._pool, tenant, wanted.name, wanted.attributes, kind)
            return admin_pb2.CreateProjectionResponse(projection=_projection(made))

        return await self._call(context, answer, "projection", wanted.name)

    async def GetProjection(  # noqa: N802
        self, request: admin_pb2.GetProjectionRequest, context: Context
    ) -> admin_pb2.GetProjectionResponse:
        """See admin.proto."""

        async def answer(_: Identity, tenant: int) -> admin_pb2.GetProjectionResponse:
            found = await find_projection(self._pool, tenant, request.name)
            return admin_pb2.GetProjectionResponse(projection=_projection(found))

        return await self._call(context, answer, "projection", request.name)

    async def ListProjections(  # noqa: N802
        self, request: admin_pb2.ListProjectionsRequest, context: Context
    ) -> admin_pb2.ListProjectionsResponse:
        """See admin.proto."""

        async def answer(_: Identity, tenant: int) -> admin_pb2.ListProjectionsResponse:
            found = await list_projections(self._pool, tenant)
            return admin_pb2.ListProjectionsResponse(projections=map(_projection, found))

        return await self._call(context, answer)

    async def DropProjection(  # noqa: N802
        self, request: admin_pb2.DropProjectionRequest, context: Context
    ) -> admin_pb2.DropProjectionResponse:
        """See admin.proto."""

        async def answer(_: Identity, tenant: int) -> admin_pb2.DropProjectionResponse:
            await drop_projection(self._pool, tenant, request.name)
            return admin_pb2.DropProjectionResponse()

        return await self._call(context, answer, "projection", request.name)

    async def DeleteEntity(  # noqa: N802
        self, request: admin_pb2.DeleteEntityRequest, context: Context
    ) -> admin_pb2.DeleteEntityResponse:
        """See admin.proto."""

        async def answer(identity: Identity, tenant: int) -> admin_pb2.DeleteEntityResponse:
            operation = _id(request.request_id, "request_id")
            entity = one_entity(identity, request.entity)
            made = await order_deletion(self._pool, tenant, entity, operation)
            return admin_pb2.DeleteEntityResponse(operation=_operation(made))

        return await self._call(context, answer)

    async def GetOperation(  # noqa: N802
        self, request: admin_pb2.GetOperationRequest, context: Context
    ) -> admin_pb2.GetOperationResponse:
        """See admin.proto."""

        async def answer(_: Identity, tenant: int) -> admin_pb2.GetOperationResponse:
            found = await find_operation(self._pool, tenant, _id(request.operation_id, "operation_id"))
            return admin_pb2.GetOperationResponse(operation=_operation(found))

        return await self._call(context, answer, "operation_id", request.operation_id.hex())

    async def ListOperations(  # noqa: N802
        self, request: admin_pb2.ListOperationsRequest, context: Context
    ) -> admin_pb2.ListOperationsResponse:
        """See admin.proto."""

        async def answer(identity: Identity, tenant: int) -> admin_pb2.ListOperationsResponse:
            size = page_size(request.page_size, LIST_PAGE)
            position = self._tokens.open(identity.tenant, request)
            after = None if position is None else _position(position)
            found = await list_operations(self._pool, tenant, limit=size + 1, after=after)
            token = ""
            if len(found) > size:
                last = found[size - 1]
                at = microseconds(last.created_at).to_bytes(8, "big")
                token = self._tokens.seal(at + last.operation_id.bytes, identity.tenant, request)
            return admin_pb2.ListOperationsResponse(operations=map(_operation, found[:size]), next_page_token=token)

        return await self._call(context, answer)

    async def _call(
        self, context: Context, answer: Callable[[Identity, int], Awaitable[Answer]], what: str = "", name: str = ""
    ) -> Answer:
        """Authenticate, find the tenant, answer; errors become a status."""
        try:
            identity = self._authenticator.authenticate(context)
            if identity.kind is not IdentityKind.SERVICE:
                raise Refusal(Reason.SERVICE_REQUIRED, "only a service identity may do this")
            tenant = await self._registry.tenant(identity.tenant)
            return await answer(identity, _NO_TENANT if tenant is None else tenant.tenant_id)
        except Exception as error:  # a CancelledError is no Exception, and passes
            await abort(context, _refusal(error, what, name))


def _refusal(error: Exception, what: str, name: str) -> Exception:
    match error:
        case NotNumeric():
            return Refusal(Reason.AGGREGATE_TYPE, str(error), metadata={"attribute": error.name})
        case DeclarationInvalid():
            return field_invalid(f"{what}.{error.field}", error.problem)
        case DeclarationExists():
            reason = Reason.ROLLUP_EXISTS if what == "rollup" else Reason.PROJECTION_EXISTS
            return Refusal(reason, str(error), metadata={what: name})
        case DeclarationNotFound():
            reason = Reason.ROLLUP_NOT_FOUND if what == "rollup" else Reason.PROJECTION_NOT_FOUND
            return Refusal(reason, str(error), metadata={what: name})
        case DeclarationQuota():
            return Refusal(Reason.QUOTA_EXCEEDED, str(error), metadata={"limit": str(error.limit)})
        case OperationNotFound():
            return Refusal(Reason.OPERATION_NOT_FOUND, str(error), metadata={what: name})
        case OperationConflict():
            return field_invalid("request_id", "was used to delete another device")
        case _:
            # Devices and attributes that do not exist are refused as in queries.
            return refusal_of_query(error)


def _rollup(entry: RollupEntry) -> admin_pb2.Rollup:
    return admin_pb2.Rollup(
        name=entry.name,
        attributes=entry.attributes,
        backfill_from_us=_us(entry.backfill_from),
        create_time_us=_us(entry.created_at),
        status=_status(entry.status),
    )


def _projection(entry: ProjectionEntry) -> admin_pb2.Projection:
    return admin_pb2.Projection(
        name=entry.name,
        entity_type=entry.entity_type,
        attributes=entry.attributes,
        create_time_us=_us(entry.created_at),
        status=_status(entry.status),
    )


def _status(status: Status) -> admin_pb2.MaterializationStatus:
    return admin_pb2.MaterializationStatus(
        state=_STATES[status.state],
        as_of_us=_us(status.as_of),
        complete_from_us=_us(status.complete_from),
        backfilled=status.backfilled,
        rows=status.rows or 0,
        problem=status.problem,
    )


def _operation(operation: Operation) -> admin_pb2.Operation:
    if operation.ended_at is not None:
        state = admin_pb2.Operation.STATE_SUCCEEDED
    elif operation.problem:
        state = admin_pb2.Operation.STATE_RETRYING
    elif operation.started_at is not None:
        state = admin_pb2.Operation.STATE_RUNNING
    else:
        state = admin_pb2.Operation.STATE_PENDING
    return admin_pb2.Operation(
        operation_id=operation.operation_id.bytes,
        entity=operation.entity,
        state=state,
        step=_STEPS[operation.step],
        readings_deleted=operation.readings_deleted,
        create_time_us=_us(operation.created_at),
        end_time_us=_us(operation.ended_at),
        problem=operation.problem,
    )


def _us(at: datetime | None) -> int:
    return 0 if at is None else microseconds(at)


def _id(data: bytes, field: str) -> UUID:
    if len(data) != 16:
        raise field_invalid(field, f"has {len(data)} bytes, not 16")
    return UUID(bytes=data)


def _position(data: bytes) -> tuple[datetime, UUID]:
    if len(data) != 24:
        raise token_invalid()
    return moment(int.from_bytes(data[:8], "big")), UUID(bytes=data[8:])
