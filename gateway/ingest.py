"""The ingest service: device streams and unary writes, from the call to the ack."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import grpc
from atlasco.telemetry.v1 import ingest_pb2
from google.protobuf.message import DecodeError

from gateway.acks import most_unconfirmed
from gateway.aliases import AliasProblem, AliasTable, define
from gateway.auth import Authenticator, Identity
from gateway.batch import wall_clock_us
from gateway.config import GatewayConfig
from gateway.hello import Dictionaries, check_hello, device_name, unregistered
from gateway.lanes import Lanes
from gateway.status import Reason, Refusal, abort, refusal_of, stream_superseded
from gateway.stream import Context, DeviceStream
from gateway.unary import UnaryWriter
from runtime.metrics import Metrics
from storage.errors import StorageError
from storage.registry import Registry, Tenant

log = logging.getLogger(__name__)

SERVICE = ingest_pb2.DESCRIPTOR.services_by_name["IngestService"].full_name

# Seconds between two looks at the credentials of the open streams.
_RECHECK_S = 30.0

_FEATURES = [
    ingest_pb2.FeatureSupport(
        feature=ingest_pb2.FeatureSupport.FEATURE_COMMANDS,
        support=ingest_pb2.FeatureSupport.SUPPORT_UNIMPLEMENTED,
    ),
    ingest_pb2.FeatureSupport(
        feature=ingest_pb2.FeatureSupport.FEATURE_DEVICE_STATE,
        support=ingest_pb2.FeatureSupport.SUPPORT_UNIMPLEMENTED,
    ),
]


class IngestService:
    """Serves atlasco.telemetry.v1.IngestService.

    The handlers take and give bytes: a message that does not parse is then our error, with a reason, and not the
    transport's; and a message's size on the wire, which credits count, is known.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        registry: Registry,
        lanes: Lanes,
        unary: UnaryWriter,
        config: GatewayConfig,
        metrics: Metrics,
    ) -> None:
        self._authenticator = authenticator
        self._registry = registry
        self._lanes = lanes
        self._unary = unary
        self._config = config
        self._metrics = metrics
        self._dictionaries = Dictionaries(
            registry, most_aliases=config.max_aliases, clock=asyncio.get_running_loop().time
        )
        self._streams: dict[tuple[int, int], tuple[DeviceStream, Identity]] = {}
        self._open = 0
        self._stopping = False
        metrics.gauge("atlasco_streams_open", lambda: self._open)

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server adds to serve this."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "StreamTelemetry": grpc.stream_stream_rpc_method_handler(self.stream_telemetry),
                "WriteBatch": grpc.unary_unary_rpc_method_handler(
                    self.write_batch,
                    response_serializer=ingest_pb2.WriteBatchResponse.SerializeToString,
                ),
            },
        )

    async def drain(self) -> None:
        """Refuse new streams, ask the open ones to leave, and wait until they have, or the drain time is over.

        A connection that has not said hello, or reads nothing, is not waited for: it has nothing to lose here.
        """
        self._stopping = True
        for stream, _ in list(self._streams.values()):
            stream.ask_to_leave(ingest_pb2.ReconnectNotice.REASON_SHUTDOWN)
        try:
            # Twice the time streams have: once for the client to leave, once for the last acks.
            async with asyncio.timeout(2 * self._config.drain_timeout):
                while unfinished := [stream for stream, _ in self._streams.values() if not stream.finished.is_set()]:
                    await unfinished[0].finished.wait()
        except TimeoutError:
            log.warning("streams were still open when the drain time was over", extra={"streams": self._open})

    async def watch_credentials(self) -> None:
        """End streams whose credential expired or was revoked since: a day-long stream must not outlive it."""
        while True:
            await asyncio.sleep(_RECHECK_S)
            for stream, identity in list(self._streams.values()):
                try:
                    self._authenticator.recheck(identity)
                except Refusal as refusal:
                    stream.end(refusal)

    async def stream_telemetry(self, _: Any, context: Context) -> None:
        """Serve one device stream."""
        self._open += 1
        reason = "CONNECTION_LOST"
        try:
            await self._serve(context)
            reason = "OK"
        except (Refusal, StorageError) as error:
            reason = refusal_of(error).reason
            await abort(context, error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            reason = Reason.INTERNAL
            await abort(context, error)
        finally:
            self._open -= 1
            self._metrics.count("atlasco_stream_closes", reason=reason)

    async def _serve(self, context: Context) -> None:
        if self._stopping:
            raise Refusal(Reason.GATEWAY_STOPPING, "this gateway is stopping; connect again", retry_after_s=1.0)
        if self._open > self._config.max_streams:
            text = f"this gateway serves {self._config.max_streams} streams, the most it may; connect again"
            raise Refusal(Reason.OVERLOADED, text, retry_after_s=5.0)
        identity = self._authenticator.authenticate(context)
        hello = await self._read_hello(context)
        check_hello(hello)
        device = device_name(identity, hello.device_id, "device_id")
        tenant = await self._tenant(identity)
        session_id = UUID(bytes=hello.session_id)
        # The dictionary first: while the epoch is not raised, an older stream of the device goes on undisturbed.
        dictionary = await self._dictionaries.resolve(tenant, hello.dictionary)
        opened = await self._registry.open_stream(
            tenant,
            device,
            hello.entity_type,
            dict(hello.labels),
            session_id,
            most_unconfirmed=most_unconfirmed(self._config),
        )
        if opened is None:
            raise Refusal(Reason.DEVICE_UNKNOWN, unregistered(device))
        stream = DeviceStream(
            context,
            tenant,
            device,
            session_id,
            opened,
            dictionary.table,
            self._lanes,
            self._registry,
            self._define,
            self._config,
            self._metrics,
        )
        key = (tenant.tenant_id, opened.entity_id)
        older = self._streams.get(key)
        if older is not None and older[0].epoch > opened.epoch:
            # Two hellos at once; the database saw this one first, and the answers came the other way round.
            raise stream_superseded()
        if older is not None:
            older[0].supersede()
        self._streams[key] = (stream, identity)
        if self._stopping:
            stream.ask_to_leave(ingest_pb2.ReconnectNotice.REASON_SHUTDOWN)
        self._metrics.count("atlasco_stream_opens")
        welcome = ingest_pb2.Welcome(
            committed_sequence=opened.committed_sequence,
            dictionary=dictionary.status,
            alias_errors=[problem.to_wire() for problem in dictionary.problems],
            limits=self._limits(tenant),
            credits=ingest_pb2.Credits(messages=self._config.credit_messages, bytes=self._config.credit_bytes),
            epoch=opened.epoch,
            server_time_us=wall_clock_us(),
            features=_FEATURES,
        )
        try:
            await stream.run(welcome)
        finally:
            stream.finished.set()
            if self._streams.get(key) == (stream, identity):
                del self._streams[key]

    async def _read_hello(self, context: Context) -> ingest_pb2.Hello:
        try:
            async with asyncio.timeout(self._config.hello_timeout):
                raw = await context.read()
        except TimeoutError:
            text = f"no hello came within {self._config.hello_timeout:g} s"
            raise Refusal(Reason.HELLO_TIMEOUT, text) from None
        if raw is grpc.aio.EOF:
            raise Refusal(Reason.HELLO_REQUIRED, "the stream ended before a hello")
        try:
            request = ingest_pb2.StreamTelemetryRequest.FromString(raw)
        except DecodeError:
            raise Refusal(Reason.MALFORMED_MESSAGE, "not a StreamTelemetryRequest") from None
        if request.WhichOneof("message") != "hello":
            raise Refusal(Reason.HELLO_REQUIRED, "the first message of a stream is a hello")
        return request.hello

    async def _tenant(self, identity: Identity) -> Tenant:
        tenant = await self._registry.tenant(identity.tenant)
        if tenant is None:
            text = f"tenant {identity.tenant!r} is not registered here; see `atlasco tenant create`"
            raise Refusal(Reason.DEVICE_UNKNOWN, text)
        return tenant

    async def _define(
        self, tenant: Tenant, table: AliasTable, aliases: Sequence[ingest_pb2.AliasDefinition]
    ) -> tuple[AliasTable, list[AliasProblem]]:
        return await define(self._registry, tenant, table, aliases, most_aliases=self._config.max_aliases)

    def _limits(self, tenant: Tenant) -> ingest_pb2.Limits:
        return ingest_pb2.Limits(
            max_message_bytes=self._config.max_message_bytes,
            max_readings_per_message=self._config.max_readings_per_message,
            max_string_bytes=self._config.max_string_bytes,
            max_aliases=self._config.max_aliases,
            window_past_us=tenant.window_past_us,
            window_future_us=tenant.window_future_us,
            idle_timeout_ms=int(self._config.idle_timeout * 1000),
            session_retention_ms=int(self._config.session_retention * 1000),
        )

    async def write_batch(self, raw: bytes, context: Context) -> ingest_pb2.WriteBatchResponse:
        """Serve one unary write."""
        status = "OK"
        try:
            identity = self._authenticator.authenticate(context)
            if self._stopping:
                raise Refusal(Reason.GATEWAY_STOPPING, "this gateway is stopping; try again", retry_after_s=1.0)
            return await self._unary.write(identity, await self._tenant(identity), raw)
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        except Exception as error:
            status = refusal_of(error).code.name
            await abort(context, error)
        finally:
            self._metrics.count("atlasco_write_requests", status=status)
