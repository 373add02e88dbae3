"""Unary writes: one request, one transaction, one effect, however often and from however many places it comes."""

import asyncio
import secrets
from typing import Any

import grpc
import psycopg
import pytest
from atlasco.telemetry.v1 import ingest_pb2

from tests.gateway.raw_stream import (
    ALIASES,
    D,
    I,
    definitions,
    device,
    now_us,
    readings,
    reason_name,
    service,
)
from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.gateway.stored import changes, history, latest, rows, values, waiting_writes
from tests.refusals import End, end_of
from tests.storage.conftest import Database
from tests.waiting import PATIENCE_S, until

METHOD = "/atlasco.telemetry.v1.IngestService/WriteBatch"


@pytest.fixture
def t0() -> int:
    return now_us() - 60_000_000


def request(devices: dict[str, ingest_pb2.Readings], request_id: bytes = b"", **fields: Any) -> Any:
    made = ingest_pb2.WriteBatchRequest(
        request_id=request_id or secrets.token_bytes(16), aliases=definitions(ALIASES), **fields
    )
    for name, what in devices.items():
        made.devices.add(device_id=name, readings=what)
    return made


async def write(gateway: RunningGateway, tenant: str, what: Any, metadata: Any = None) -> Any:
    raw = what if isinstance(what, bytes) else what.SerializeToString()
    method: Any = gateway.channel.unary_unary(METHOD, None, ingest_pb2.WriteBatchResponse.FromString)
    return await method(raw, metadata=metadata or service(tenant), timeout=PATIENCE_S)


async def refused(gateway: RunningGateway, tenant: str, what: Any, metadata: Any = None) -> End:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await write(gateway, tenant, what, metadata)
    return end_of(caught.value)


async def test_several_devices_and_rejections_by_place(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    answer = await write(
        gateway,
        tenant,
        request(
            {
                "a": readings(t0, doubles=[(D, 0, 1.0), (99, 0, 1.0)]),
                "b": readings(t0, doubles=[(D, 0, 2.0)], int64s=[(I, 0, 7), (I, -t0, 8)]),
                "c": readings(t0, doubles=[(D, i, 1.0) for i in range(10_001)]),
                "d": readings(t0),
            }
        ),
    )
    told = [
        (one.device_index, one.index if one.HasField("index") else None, reason_name(one)) for one in answer.rejections
    ]
    assert told == [(0, 1, "UNKNOWN_ALIAS"), (1, 2, "TIMESTAMP_INVALID"), (2, None, "TOO_MANY_READINGS")]
    assert not answer.replayed
    assert len(answer.read_token) == 8
    assert values(module_database, tenant, "a") == {("temperature", t0): 1.0}
    assert values(module_database, tenant, "b") == {("temperature", t0): 2.0, ("rpm", t0): 7}
    # One transaction, one row.
    assert len(rows(module_database, "SELECT 1 FROM outbox o JOIN tenants t ON t.tenant_id = ANY (o.tenant_ids) "
                                     "WHERE t.name = %s", tenant)) == 1  # fmt: skip


async def test_a_late_retry_does_not_undo_a_correction(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    first = request({"a": readings(t0, doubles=[(D, 0, 1.0), (99, 0, 0.0)])})
    answer = await write(gateway, tenant, first)
    await write(gateway, tenant, request({"a": readings(t0, doubles=[(D, 0, 2.0)])}))
    again = await write(gateway, tenant, first)
    assert again.replayed
    assert (again.rejections, again.read_token) == (answer.rejections, answer.read_token)
    assert history(module_database, tenant, "a") == {("temperature", t0): (2.0, 1)}
    assert latest(module_database, tenant, "a") == {"temperature": (t0, 2.0)}
    assert len(changes(module_database, tenant)) == 2


async def test_a_request_id_used_for_something_else(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    request_id = secrets.token_bytes(16)
    await write(gateway, tenant, request({"a": readings(t0, doubles=[(D, 0, 1.0)])}, request_id))
    other = request({"a": readings(t0, doubles=[(D, 0, 2.0)])}, request_id)
    end = await refused(gateway, tenant, other)
    assert (end.code, end.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    assert values(module_database, tenant, "a") == {("temperature", t0): 1.0}
    # An id is the tenant's own.
    assert not (await write(gateway, f"{tenant}-other", other)).replayed


async def test_racing_duplicates_take_effect_once(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    async with running_gateway(module_database) as second:
        what = request({"a": readings(t0, doubles=[(D, i, 1.0) for i in range(100)])})
        answers = await asyncio.gather(
            *(write(one, tenant, what) for one in (gateway, second, gateway, second, gateway, second))
        )
    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 5
    assert len({answer.read_token for answer in answers}) == 1
    assert len(changes(module_database, tenant)) == 100


async def test_one_device_twice_in_a_request(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    what = request({"a": readings(t0, doubles=[(D, 0, 1.0)])})
    what.devices.add(device_id="a", readings=readings(t0, doubles=[(D, 0, 2.0)]))
    assert not (await write(gateway, tenant, what)).rejections
    assert values(module_database, tenant, "a") == {("temperature", t0): 2.0}


async def test_a_device_writes_for_itself_only(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    what = readings(t0, doubles=[(D, 0, 1.0)])
    await write(gateway, tenant, request({"a": what}), device(tenant, "a"))
    await write(gateway, tenant, request({"": what}), device(tenant, "b"))
    end = await refused(gateway, tenant, request({"a": what, "b": what}), device(tenant, "a"))
    assert (end.code, end.reason) == ("PERMISSION_DENIED", "DEVICE_MISMATCH")
    assert values(module_database, tenant, "b") == {("temperature", t0): 1.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"request_id": b"short"}, "REQUEST_INVALID"),
        ({"devices": []}, "REQUEST_INVALID"),
        ({"devices": [ingest_pb2.DeviceReadings(device_id="")]}, "REQUEST_INVALID"),
        ({"devices": [ingest_pb2.DeviceReadings(device_id="a\0")]}, "REQUEST_INVALID"),
        ({"devices": [ingest_pb2.DeviceReadings(device_id=f"d{i}") for i in range(50_001)]}, "REQUEST_INVALID"),
    ],
    ids=["id", "no devices", "no name", "bad name", "too many devices"],
)
async def test_requests_out_of_bounds(
    gateway: RunningGateway, module_database: Database, tenant: str, change: dict[str, Any], reason: str
) -> None:
    fields = {"request_id": secrets.token_bytes(16), "devices": [ingest_pb2.DeviceReadings(device_id="a")]} | change
    end = await refused(gateway, tenant, ingest_pb2.WriteBatchRequest(**fields))
    assert (end.code, end.reason) == ("INVALID_ARGUMENT", reason)


async def test_too_many_readings(gateway: RunningGateway, module_database: Database, tenant: str, t0: int) -> None:
    devices = {f"d{i}": readings(t0, doubles=[(D, j, 1.0) for j in range(9_000)]) for i in range(6)}
    assert (await refused(gateway, tenant, request(devices))).reason == "REQUEST_INVALID"
    assert changes(module_database, tenant) == []


async def test_bytes_that_are_no_request(gateway: RunningGateway, tenant: str) -> None:
    end = await refused(gateway, tenant, b"\xff\xff")
    assert (end.code, end.reason) == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")


async def test_an_unknown_device_of_a_tenant_that_registers_none(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    rows(module_database, "SELECT register_tenant(%s)", tenant)
    rows(module_database, "UPDATE tenants SET register_entities = false WHERE name = %s", tenant)
    end = await refused(gateway, tenant, request({"a": readings(t0, doubles=[(D, 0, 1.0)])}))
    assert (end.code, end.reason, end.metadata) == (
        "PERMISSION_DENIED", "DEVICE_UNKNOWN", {"field": "devices[0].device_id"},
    )  # fmt: skip


async def test_a_full_gateway_says_when_to_come_again(module_database: Database, tenant: str, t0: int) -> None:
    async with running_gateway(module_database, tenant_queue_readings=50, queue_readings=100) as small:
        with psycopg.connect(module_database()) as lock:
            lock.execute("LOCK TABLE outbox IN SHARE MODE")
            first = request({"a": readings(t0, doubles=[(D, i, 1.0) for i in range(40)])})
            second = request({"b": readings(t0, doubles=[(D, i, 1.0) for i in range(40)])})
            writing = asyncio.create_task(write(small, tenant, first))
            await until(lambda: waiting_writes(module_database) == 1, "the write waits", beside=writing)
            end = await refused(small, tenant, second)
            assert (end.code, end.reason, end.retry_after_s) == ("RESOURCE_EXHAUSTED", "OVERLOADED", 1.0)
            lock.rollback()
        await writing
        assert not (await write(small, tenant, second)).replayed
    assert len(changes(module_database, tenant)) == 80


async def test_a_caller_that_gives_up_leaves_no_room_taken(module_database: Database, tenant: str, t0: int) -> None:
    async with running_gateway(module_database, tenant_queue_readings=50, queue_readings=100) as small:
        with psycopg.connect(module_database()) as lock:
            lock.execute("LOCK TABLE outbox IN SHARE MODE")
            what = request({"a": readings(t0, doubles=[(D, i, 1.0) for i in range(40)])})
            writing = asyncio.create_task(write(small, tenant, what))
            await until(lambda: waiting_writes(module_database) == 1, "the write waits", beside=writing)
            writing.cancel()
            await asyncio.wait({writing})
            await until(lambda: small.metrics.values("atlasco_write_requests").get(("CANCELLED",)) == 1)
            lock.rollback()
        # Whether or not the first took effect, the same request again does, once.
        await write(small, tenant, what)
    assert len(changes(module_database, tenant)) == 40
