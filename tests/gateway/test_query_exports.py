"""Exports whose clients take their time, or none of what they are sent: what they hold, and what ends them."""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import psycopg
import pytest
from atlasco.telemetry.v1 import query_pb2

from gateway.query import QueryLimits
from gateway.query_admission import QueryAdmission
from gateway.status import Reason, Refusal
from tests.gateway.patience_clock import PatienceClock
from tests.gateway.test_query import Service, register_anew, serve
from tests.refusals import End, end_of
from tests.storage.reads_database import Known, known_database, register_entity
from tests.waiting import PATIENCE_S, until

READINGS = 150_000
# The client's transport takes a hundred kilobytes, then no more until the client reads.
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    """With a device "long" of either tenant, and another one, "longer", of which an export is megabytes."""
    with known_database(tmp_path_factory.mktemp("exports")) as made:
        with psycopg.connect(made.dsn(), autocommit=True) as connection:
            for tenant, number in made.tenants.items():
                register_entity(connection, made, tenant, "long")
                register_entity(connection, made, tenant, "longer")
                connection.execute(
                    "INSERT INTO entity_attributes_bigint (tenant_id, entity_id, attribute_id, ts, value) "
                    "SELECT e.tenant_id, e.entity_id, a.attribute_id, now() - n * interval '1 ms', n * 1000003::bigint "
                    "FROM entities e JOIN attributes a USING (tenant_id), generate_series(1, %s) n "
                    "WHERE e.tenant_id = %s AND e.external_id LIKE 'long%%' AND a.name = 'attribute-1'",
                    [READINGS, number],
                )
        yield made


def export(
    service: Service, known: Known, tenant: str = "acme", *, chunk_size: int = 50_000, device: str = "long"
) -> Any:
    """With the default chunk the first page alone is more than the window takes."""
    request = query_pb2.ExportSeriesRequest(
        entities=[device], attributes=["attribute-1"], start_time_us=1, end_time_us=known.now_us * 2,
        chunk_size=chunk_size,
    )  # fmt: skip
    return service.stub.ExportSeries(request, metadata=metadata(tenant))


def metadata(tenant: str) -> tuple[tuple[str, str], ...]:
    return (("atlasco-tenant", tenant), ("atlasco-service", "test"))


async def unread(service: Service, known: Known, tenant: str = "acme", device: str = "long") -> Any:
    """An export of which one message is read, and then no more."""
    call = export(service, known, tenant, device=device)
    assert (await anext(aiter(call))).HasField("provenance")
    return call


async def ended(call: Any) -> End:
    """How an export ends that is read on."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for message in call:
            assert not message.HasField("summary")
    return end_of(caught.value)


async def read_to_the_end(call: Any) -> int:
    count = 0
    async for message in call:
        count += sum(len(series.times_us) for series in message.series)
        if message.HasField("summary"):
            assert message.summary.readings == count
            return count
    raise AssertionError("no summary")


async def test_exports_that_nobody_reads_shut_out_no_query(known: Known) -> None:
    limits = QueryLimits(concurrency=3, tenant_concurrency=2, tenant_exports=3)
    async with serve(known, limits, SMALL_WINDOW) as service:
        calls = [await unread(service, known, tenant) for tenant in ("acme", "acme", "acme", "rival", "rival")]
        assert service.metrics.value("atlasco_exports_open") == 5
        for tenant in ("acme", "rival"):
            assert (await service.ask(query_pb2.ListAttributesRequest(), metadata(tenant))).attributes
        # They are whole, for whoever reads them at last.
        assert await asyncio.gather(*(read_to_the_end(call) for call in calls)) == [READINGS] * 5
        await until(lambda: service.metrics.value("atlasco_exports_open") == 0)


async def test_one_export_too_many_is_refused_at_once(known: Known) -> None:
    async with serve(known, QueryLimits(tenant_exports=2), SMALL_WINDOW) as service:
        calls = [await unread(service, known) for _ in range(2)]
        end = await ended(export(service, known))
        assert end == End("RESOURCE_EXHAUSTED", "EXPORT_CONCURRENCY", {"limit": "2"}, 1.0)
        other = await unread(service, known, "rival")
        other.cancel()
        calls[0].cancel()
        await until(lambda: service.metrics.value("atlasco_exports_open") == 1)
        assert await read_to_the_end(export(service, known)) == READINGS
        assert await read_to_the_end(calls[1]) == READINGS


@pytest.mark.parametrize("resumes", [True, False], ids=["reads at last", "vanishes"])
async def test_an_export_that_nobody_reads_is_ended(known: Known, patience_clock: PatienceClock, resumes: bool) -> None:
    async with serve(known, QueryLimits(tenant_exports=1, export_patience_s=10.0), SMALL_WINDOW) as service:
        call = await unread(service, known)

        def given_up() -> bool:
            patience_clock.go_on(0.2)
            return service.metrics.value("atlasco_exports_unread") == 1

        await until(given_up)
        assert patience_clock.now_s >= 10.0
        assert service.metrics.value("atlasco_exports_open") == 0
        # One that was not read may still lie in the transport, and no more of them.
        refused = await ended(export(service, known))
        assert refused == End("RESOURCE_EXHAUSTED", "EXPORT_CONCURRENCY", {"limit": "1"}, 1.0)
        if resumes:
            assert await ended(call) == End("RESOURCE_EXHAUSTED", "SLOW_READER")
        else:
            call.cancel()
        counted = {"method": "ExportSeries", "status": "RESOURCE_EXHAUSTED"}
        await until(lambda: service.metrics.value("atlasco_query_requests", **counted) == 2)
        assert await read_to_the_end(export(service, known)) == READINGS


async def test_a_client_that_reads_slowly_keeps_its_export(known: Known, patience_clock: PatienceClock) -> None:
    async with serve(known, QueryLimits(export_patience_s=10.0), SMALL_WINDOW) as service:
        call = export(service, known, chunk_size=5_000)
        count = waited_for = 0
        async for message in call:
            count += sum(len(series.times_us) for series in message.series)
            waited_for += patience_clock.unread
            # Longer than the patience in all, and never as long between two messages.
            patience_clock.go_on(0.5)
        assert count == READINGS
        assert waited_for > 0
        assert patience_clock.now_s > 10.0


async def test_an_export_whose_device_is_replaced_meanwhile_fails(known: Known) -> None:
    async with serve(known, QueryLimits(), SMALL_WINDOW) as service:
        call = await unread(service, known, device="longer")
        register_anew(known, "longer")
        assert await ended(call) == End("ABORTED", "ENTITY_REPLACED", {"entity": "longer"})


async def test_the_next_part_of_an_answer_waits_for_its_turn() -> None:
    admission = QueryAdmission(2, 1)
    order: list[str] = []

    async def part(name: str, tenant: str) -> None:
        async with admission.admitted_in_turn(tenant, PATIENCE_S):
            order.append(name)

    with admission.admitted("acme"), admission.admitted("rival"):
        waiting = [asyncio.create_task(part(*of)) for of in (("a", "acme"), ("b", "acme"), ("c", "rival"))]
        given_up = asyncio.create_task(part("never", "acme"))
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(Refusal) as caught:
            async with admission.admitted_in_turn("acme", 0.01):
                pass
        assert caught.value.reason is Reason.QUERY_CONCURRENCY
        assert order == []
    # The places are theirs, though none of them has run yet.
    with pytest.raises(Refusal), admission.admitted("third"):
        pass
    await asyncio.gather(*waiting)
    assert sorted(order) == ["a", "b", "c"]
    assert order.index("a") < order.index("b")
    assert admission.running == 0


async def test_a_turn_that_comes_as_it_is_given_up_goes_to_the_next() -> None:
    admission = QueryAdmission(1, 1)
    entered: list[str] = []

    async def part(name: str) -> None:
        async with admission.admitted_in_turn("acme", PATIENCE_S):
            entered.append(name)

    with admission.admitted("acme"):
        first, second = asyncio.create_task(part("first")), asyncio.create_task(part("second"))
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first, second})
    assert first.cancelled()
    assert entered == ["second"]
    assert admission.running == 0
