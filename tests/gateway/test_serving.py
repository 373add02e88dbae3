"""What every gateway offers without being asked: health, reflection, metrics; and that streams leave nothing behind."""

import asyncio
import json
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from runtime.config import ConfigError
from tests.gateway.raw_stream import D, RawStream, now_us, readings
from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.gateway.stored import values
from tests.storage.conftest import Database
from tests.waiting import until

SERVICES = {"atlasco.telemetry.v1.IngestService", "atlasco.telemetry.v1.QueryService", "grpc.health.v1.Health"}


async def http(gateway: RunningGateway, path: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection(gateway.admin.address.host, gateway.admin.address.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), body


async def test_health(gateway: RunningGateway) -> None:
    stub: Any = health_pb2_grpc.HealthStub(gateway.channel)
    for service in ("", "atlasco.telemetry.v1.IngestService", "atlasco.telemetry.v1.QueryService"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="unknown"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_says_when_the_gateway_is_leaving(module_database: Database, tenant: str) -> None:
    async with running_gateway(module_database) as leaving:
        stub: Any = health_pb2_grpc.HealthStub(leaving.channel)
        # A stream keeps the drain going while we look.
        stream = RawStream(leaving.channel, tenant, "d")
        await stream.hello()
        stopping = asyncio.create_task(leaving.stop())
        await stream.hear("reconnect_notice")
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        status, body = await http(leaving, "/readyz")
        assert (status, json.loads(body)["checks"]["staying"]["ok"]) == (503, False)
        late = RawStream(leaving.channel, tenant, "late")
        end = await late.ended()
        assert (end.code, end.reason) == ("UNAVAILABLE", "GATEWAY_STOPPING")
        await stream.half_close()
        assert await stopping == 0


async def test_an_address_in_use_is_named(gateway: RunningGateway, module_database: Database) -> None:
    with pytest.raises(ConfigError, match=f"ATLASCO_LISTEN: cannot listen on {gateway.target}"):
        async with running_gateway(module_database, listen=gateway.config.listen):
            pass


async def test_a_client_that_knows_nothing_finds_its_way(gateway: RunningGateway) -> None:
    channel: Any = gateway.channel
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest

    async def ask(what: Any) -> Any:
        async for answer in stub.ServerReflectionInfo(iter([what])):
            return answer

    listed = await ask(request(list_services=""))
    assert {service.name for service in listed.list_services_response.service} > SERVICES
    pool = descriptor_pool.DescriptorPool()

    async def load(answer: Any) -> None:
        for raw in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(raw)
            for dependency in file.dependency:
                await load(await ask(request(file_by_filename=dependency)))
            pool.Add(file)

    await load(await ask(request(file_containing_symbol="atlasco.telemetry.v1.IngestService")))
    service = pool.FindServiceByName("atlasco.telemetry.v1.IngestService")
    assert [method.name for method in service.methods] == ["StreamTelemetry", "WriteBatch"]
    assert service.methods_by_name["WriteBatch"].input_type.fields_by_name["request_id"].number == 1


async def test_the_admin_port_counts(module_database: Database, tenant: str) -> None:
    async with running_gateway(module_database) as gateway:
        stream = RawStream(gateway.channel, tenant, "d")
        await stream.hello()
        await stream.send(1, readings(now_us(), doubles=[(D, 0, 1.0), (D, -1, 2.0), (99, 0, 3.0)]))
        await stream.acks_through(1)
        # The client may have read the ack before the gateway knows that it was taken.
        await until(lambda: gateway.metrics.distribution("atlasco_ack_latency_seconds").count == 1)
        status, body = await http(gateway, "/metrics")
        assert status == 200
        lines = dict(line.rsplit(" ", 1) for line in body.splitlines() if line and not line.startswith("#"))
        for name, expected in {
            "atlasco_streams_open": 1,
            "atlasco_stream_opens_total": 1,
            "atlasco_messages_received_total": 1,
            'atlasco_readings_received_total{type="double"}': 3,
            'atlasco_readings_committed_total{type="double"}': 2,
            'atlasco_copy_rows_total{type="double"}': 2,
            'atlasco_readings_rejected_total{reason="UNKNOWN_ALIAS"}': 1,
            "atlasco_ack_latency_seconds_count": 1,
            'atlasco_pool_connections_in_use{pool="write"}': 0,
        }.items():
            assert float(lines[name]) == expected, name
        assert (await http(gateway, "/readyz"))[0] == 200
        stream.drop()


async def test_what_a_stale_stream_sent_is_not_counted_as_committed(module_database: Database, tenant: str) -> None:
    async with running_gateway(module_database) as one, running_gateway(module_database) as other:
        older, newer = RawStream(one.channel, tenant, "d"), RawStream(other.channel, tenant, "d")
        await older.hello()
        await newer.hello()
        await older.send(1, readings(now_us(), doubles=[(D, 0, 1.0), (99, 0, 0.0)]))
        await older.ended()
        assert one.metrics.values("atlasco_readings_committed") == {}
        assert one.metrics.values("atlasco_readings_rejected") == {}
        newer.drop()


async def test_streams_leave_nothing_behind(gateway: RunningGateway, module_database: Database, tenant: str) -> None:
    before = len(asyncio.all_tasks())
    t0 = now_us()

    async def come_and_go(number: int) -> None:
        stream = RawStream(gateway.channel, tenant, f"d{number % 50}")
        await stream.hello()
        await stream.send(1, readings(t0, doubles=[(D, number, 1.0)]))
        if number % 3 == 0:
            await stream.acks_through(1)
            await stream.half_close()
        elif number % 3 == 1:
            await stream.say(b"\xff")
            await stream.ended()
        else:
            stream.drop()

    for start in range(0, 500, 50):
        await asyncio.gather(*(come_and_go(number) for number in range(start, start + 50)))
    await until(lambda: gateway.metrics.value("atlasco_streams_open") == 0)
    lanes = range(4)
    await until(lambda: not any(gateway.metrics.value("atlasco_lane_queue_readings", lane=str(i)) for i in lanes))
    await until(lambda: len(asyncio.all_tasks()) <= before + 10)
    # What was acked is there; of the dropped ones whatever had arrived.
    assert len(values(module_database, tenant, "d0")) > 0
    closes = gateway.metrics.values("atlasco_stream_closes")
    assert sum(closes.values()) >= 500
    assert ("INTERNAL",) not in closes
