"""Unary writes: several devices' readings in one request and one transaction, once for each request id."""

import asyncio
import logging
from collections.abc import Sequence
from typing import cast
from uuid import UUID

from atlasco.telemetry.v1 import ingest_pb2
from google.protobuf.message import DecodeError

from gateway.acks import read_token
from gateway.aliases import MAX_ALIAS, AliasTable, define
from gateway.auth import Identity
from gateway.batch import Committer
from gateway.config import GatewayConfig
from gateway.decode import Received, count_readings, weight
from gateway.hello import check_description, device_name, unregistered
from gateway.room import Room
from gateway.status import Reason, Refusal, overloaded
from storage.commit import UnaryRequest, Writer, request_digest
from storage.errors import DuplicateKey, StorageError
from storage.model import BatchMessage, RejectedReading, lane_of
from storage.model import Reason as RejectionReason
from storage.registry import FixedSettings, Registry, Tenant

log = logging.getLogger(__name__)

# How long a unary write waits for room before it is told to come back.
_PATIENCE_S = 2.0
_RETRY_AFTER_S = 1.0
# Tries of a transaction that lost a race, before the caller is asked to try again.
_TRIES = 3


class UnaryWriter:
    """Carries out WriteBatch.

    Its readings take room like any others; as many transactions run at once as there are connections for them.
    """

    def __init__(
        self, committer: Committer, registry: Registry, room: Room, settings: FixedSettings, config: GatewayConfig,
        writer: Writer,
    ) -> None:  # fmt: skip
        self._committer = committer
        self._registry = registry
        self._room = room
        self._settings = settings
        self._config = config
        self._writer = writer
        self._running = asyncio.Semaphore(config.unary_connections)

    async def write(self, identity: Identity, tenant: Tenant, raw: bytes) -> ingest_pb2.WriteBatchResponse:
        """Carry out a request, or answer it with what is stored when it was carried out before.

        Raises:
            Refusal: see WriteBatch in the protocol.
            StorageError: the database did not take it; the same request may come again.
        """
        request = self._parse(raw)
        request_id = UUID(bytes=request.request_id)
        digest = request_digest(request.SerializeToString(deterministic=True))
        stored = await self._stored(tenant, request_id, digest)
        if stored is not None:
            return stored
        received = await self._receive(identity, tenant, request)
        count = sum(message.count for message in received)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._room.enter(tenant.tenant_id, count)
        except TimeoutError:
            text = f"{self._room.used} readings wait in this gateway; send the same request again"
            raise overloaded(text, _RETRY_AFTER_S) from None
        try:
            async with self._running:
                return await self._commit(tenant, request_id, digest, received)
        finally:
            self._room.leave(tenant.tenant_id, count)

    def _parse(self, raw: bytes) -> ingest_pb2.WriteBatchRequest:
        try:
            request = ingest_pb2.WriteBatchRequest.FromString(raw)
        except DecodeError:
            raise Refusal(Reason.MALFORMED_MESSAGE, "not a WriteBatchRequest") from None
        if len(request.request_id) != 16:
            raise _invalid("request_id", f"has {len(request.request_id)} bytes, not 16")
        if len(request.aliases) > MAX_ALIAS:
            raise _invalid("aliases", f"has {len(request.aliases)} definitions, and there are {MAX_ALIAS} aliases")
        if not request.devices:
            raise _invalid("devices", "is empty")
        # A device costs a look into the registry, with readings or without.
        count = sum(max(1, count_readings(device.readings)) for device in request.devices)
        if count > self._config.max_batch_readings:
            raise _invalid("devices", f"hold {count} readings, at most {self._config.max_batch_readings} are allowed")
        return request

    async def _receive(
        self, identity: Identity, tenant: Tenant, request: ingest_pb2.WriteBatchRequest
    ) -> list[Received]:
        named = []
        for position, device in enumerate(request.devices):
            try:
                named.append(device_name(identity, device.device_id, "device_id"))
                check_description(device.entity_type, dict(device.labels))
            except Refusal as refusal:
                if refusal.reason is not Reason.HELLO_INVALID:
                    raise
                # The rules are those of a hello; the answer is that of a request.
                field = f"devices[{position}].{refusal.field}"
                raise Refusal(Reason.REQUEST_INVALID, f"devices[{position}]: {refusal.text}", field=field) from None
        aliases, _ = await define(
            self._registry, tenant, AliasTable(), request.aliases, most_aliases=self._config.max_aliases
        )
        received = []
        for position, (device, name) in enumerate(zip(request.devices, named, strict=True)):
            entity_id = await self._registry.entity(tenant, name, device.entity_type, dict(device.labels))
            if entity_id is None:
                raise Refusal(Reason.DEVICE_UNKNOWN, unregistered(name), field=f"devices[{position}].device_id")
            count, size = count_readings(device.readings), device.ByteSize()
            refused = None
            if count > self._config.max_readings_per_message:
                text = f"{count} readings of one device, at most {self._config.max_readings_per_message} are allowed"
                refused = RejectedReading(None, RejectionReason.TOO_MANY_READINGS, text)
            received.append(
                Received(
                    tenant=tenant,
                    entity_id=entity_id,
                    entity_name=name,
                    aliases=aliases,
                    readings=device.readings,
                    size=size,
                    count=weight(count, size),
                    sequence=position,
                    refused=refused,
                )
            )
        return received

    async def _commit(
        self, tenant: Tenant, request_id: UUID, digest: bytes, received: Sequence[Received]
    ) -> ingest_pb2.WriteBatchResponse:
        lane = lane_of(received[0].entity_id, self._settings.buckets, self._settings.lanes)
        for attempt in range(_TRIES):
            batch = self._committer.assemble(received, lane)
            record = UnaryRequest(
                tenant.tenant_id,
                request_id,
                digest,
                lambda messages, xid: _response(messages, xid).SerializeToString(),
            )
            try:
                written = await self._committer.commit(self._writer, batch, record)
            except DuplicateKey:
                # The same request came twice at once and the other one was first.
                stored = await self._stored(tenant, request_id, digest)
                if stored is not None:
                    return stored
                raise
            except StorageError as error:
                if not error.retriable or attempt == _TRIES - 1:
                    raise
                log.info("a unary write is tried again", extra={"problem": str(error), "sqlstate": error.sqlstate})
            else:
                return _response(batch.messages, written.xid or 0)
        raise AssertionError("the last try returns or raises")

    async def _stored(self, tenant: Tenant, request_id: UUID, digest: bytes) -> ingest_pb2.WriteBatchResponse | None:
        found = await self._writer.find_request(tenant.tenant_id, request_id)
        if found is None:
            return None
        if found[0] != digest:
            text = "this request_id was used for another request; every new request needs a new one"
            raise Refusal(Reason.REQUEST_ID_REUSED, text)
        response = ingest_pb2.WriteBatchResponse.FromString(found[1])
        response.replayed = True
        return response


def _response(messages: Sequence[BatchMessage], xid: int) -> ingest_pb2.WriteBatchResponse:
    return ingest_pb2.WriteBatchResponse(
        rejections=[
            ingest_pb2.BatchRejection(
                device_index=message.sequence,
                index=rejection.index,
                reason=cast("ingest_pb2.RejectionReason.ValueType", int(rejection.reason)),
                text=rejection.text,
                quarantined=rejection.quarantined,
            )
            for message in messages
            for rejection in message.rejections
        ],
        read_token=read_token(xid),
    )


def _invalid(field: str, problem: str) -> Refusal:
    return Refusal(Reason.REQUEST_INVALID, f"{field} {problem}", field=field)
