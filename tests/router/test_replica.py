"""Freshness on a real streaming replica: nothing claims more than it has, and what can be routed is."""

import asyncio
import logging
import time
from collections import Counter
from typing import Any

import grpc
import psycopg
import pytest
from atlasco.telemetry.v1 import query_pb2

from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.refusals import refusal
from tests.router.router_support import (
    PRIMARY,
    REPLICA,
    Pair,
    ask,
    hanging,
    latest,
    latest_of_replica,
    value_of,
    write,
)
from tests.storage.conftest import Database
from tests.waiting import PATIENCE_S, until

log = logging.getLogger(__name__)

DASHBOARD = {"tier": query_pb2.TIER_DASHBOARD}
REPORT = {"tier": query_pb2.TIER_REPORT}
CRITICAL = {"tier": query_pb2.TIER_CRITICAL}


async def source_fresh(gateway: RunningGateway, tenant: str, name: str, *, fresh: bool = True) -> None:
    """Wait until the gateway has noticed how the replica does."""

    async def noticed() -> bool:
        found = await ask(gateway.channel, tenant, query_pb2.GetFreshnessRequest())
        (source,) = [s for s in found.sources if s.name == name]
        if fresh:
            return bool(source.available and 0 < source.staleness_us < 90_000)
        # Certainly: how far the clock may be off is part of the staleness, and much on a busy machine.
        return bool(source.staleness_us - found.uncertainty_us > 150_000)

    await until(noticed, f"{name} is {'fresh' if fresh else 'stale'}")


async def test_healthy_the_replica_serves_the_dashboards(pair: Pair, gateway: RunningGateway, tenant: str) -> None:
    await write(gateway.channel, tenant, "d", 1)
    pair.catch_up()
    await source_fresh(gateway, tenant, "replica-1")

    async def healthy() -> bool:
        seen: Counter[int] = Counter()
        for _ in range(200):
            provenance = (await latest(gateway.channel, tenant, "d", **DASHBOARD)).provenance
            seen[provenance.source] += 1
            assert provenance.staleness_us <= 100_000
            assert not provenance.degraded
            if provenance.source != REPLICA:
                (candidate,) = [c for c in provenance.plan.candidates if c.name == "replica-1"]
                failed = [step for step in provenance.plan.steps if step.name == "replica-1" and step.failure]
                behind = "lags" in candidate.reason or "no answer within" in candidate.reason
                assert failed or (not candidate.chosen and behind), provenance
        return seen[REPLICA] >= 0.95 * 200

    # Windows, until there is a healthy one: on a busy machine the replica is now and then too far behind, or silent,
    # and nobody but the primary may answer. Then the plan says so.
    await until(healthy, "a window of the replica's answers", patience_s=120)


async def test_the_plan_is_explained(pair: Pair, gateway: RunningGateway, tenant: str) -> None:
    await write(gateway.channel, tenant, "d", 1)
    pair.catch_up()
    await source_fresh(gateway, tenant, "replica-1")
    plans: list[query_pb2.Plan] = []

    async def precise() -> bool:
        plans.append((await latest_of_replica(gateway.channel, tenant, "d", **REPORT)).provenance.plan)
        return 0 < plans[-1].uncertainty_us < 1_000_000

    # A measurement of the clock that was held up says little until the next one.
    await until(precise, "the primary's clock is known to a second")
    plan = plans[-1]
    assert plan.max_staleness_us == 30_000_000
    assert plan.needed_as_of_us == plan.arrival_us - 30_000_000
    assert [c.name for c in plan.candidates] == ["replica-1", "primary"]
    assert [c.chosen for c in plan.candidates] == [True, False]
    assert [s.name for s in plan.steps] == ["replica-1"]


@pytest.mark.parametrize("trouble", ["none", "paused", "delayed", "stopped"])
async def test_no_answer_claims_more_than_it_has(  # noqa: PLR0915 - one story
    pair: Pair, gateway: RunningGateway, tenant: str, trouble: str
) -> None:
    tenant = f"honest-{trouble}"
    await write(gateway.channel, tenant, "d", 0)
    pair.catch_up()
    await source_fresh(gateway, tenant, "replica-1")
    # (acked at or before, by the primary's clock; value), in order of writing.
    acked: list[tuple[int, int]] = []
    ended = asyncio.Event()

    async def writer() -> None:
        value = 0
        while not ended.is_set():
            value += 1
            await write(gateway.channel, tenant, "d", value)
            now = await ask(gateway.channel, tenant, query_pb2.GetFreshnessRequest())
            acked.append((now.time_us, value))

    problems: list[str] = []
    seen: Counter[tuple[int, int]] = Counter()

    async def checker(name: str, freshness: dict[str, Any]) -> None:
        while not ended.is_set():
            newest = acked[-1][1] if acked else 0
            answer = await latest(gateway.channel, tenant, "d", **freshness)
            got, as_of_us = value_of(answer), answer.provenance.as_of_us
            seen[freshness["tier"], answer.provenance.source] += 1
            if freshness == CRITICAL and got < newest:
                problems.append(f"{name}: CRITICAL saw {got} after {newest} was acked")
            committed = max((v for at, v in acked if at < as_of_us), default=0)
            if got < committed:
                problems.append(f"{name}: as of {as_of_us} saw {got}, {committed} had been committed")

    async with asyncio.TaskGroup() as group:
        group.create_task(writer())
        checkers = [CRITICAL, DASHBOARD, REPORT, DASHBOARD]
        for number, freshness in enumerate(checkers):
            group.create_task(checker(f"client {number}", freshness))

        async def enough(count: int) -> None:
            goal = sum(seen.values()) + count
            await until(lambda: sum(seen.values()) >= goal or problems, f"{count} more answers")

        async def dashboard_of(source: int) -> None:
            before = seen[DASHBOARD["tier"], source]
            await until(lambda: seen[DASHBOARD["tier"], source] > before or problems, f"a dashboard of source {source}")

        await enough(100)
        await dashboard_of(REPLICA)
        match trouble:
            case "paused":
                await asyncio.to_thread(pair.pause_replay)
            case "delayed":
                await asyncio.to_thread(pair.replica.set_apply_delay, 400)
            case "stopped":
                pair.replica.stop()
        await enough(300)
        if trouble != "none":
            await dashboard_of(PRIMARY)
        match trouble:
            case "paused":
                await asyncio.to_thread(pair.replica.resume_replay)
            case "delayed":
                await asyncio.to_thread(pair.replica.set_apply_delay, 0)
            case "stopped":
                pair.replica.start()
        await enough(100)
        ended.set()
    assert not problems, problems[:5]
    assert {source for (tier, source) in seen if tier == CRITICAL["tier"]} == {PRIMARY}
    await source_fresh(gateway, tenant, "replica-1")


async def test_a_read_token_is_served_by_the_replica_once_it_has_the_write(
    pair: Pair, gateway: RunningGateway, tenant: str
) -> None:
    await write(gateway.channel, tenant, "d", 1)
    pair.catch_up()
    await source_fresh(gateway, tenant, "replica-1")
    pair.pause_replay()
    token = await write(gateway.channel, tenant, "d", 2)
    behind = await latest_of_replica(gateway.channel, tenant, "d", **REPORT)
    assert value_of(behind) == 1
    with_token = await latest(gateway.channel, tenant, "d", read_token=token, **REPORT)
    assert (with_token.provenance.source, value_of(with_token)) == (PRIMARY, 2)
    steps = [(s.name, bool(s.failure)) for s in with_token.provenance.plan.steps]
    assert steps == [("replica-1", True), ("primary", False)]
    pair.replica.resume_replay()
    pair.catch_up()
    there = await latest_of_replica(gateway.channel, tenant, "d", read_token=token, **REPORT)
    assert value_of(there) == 2


async def test_a_token_of_another_database_is_refused(gateway: RunningGateway, tenant: str) -> None:
    await write(gateway.channel, tenant, "d", 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await latest(gateway.channel, tenant, "d", read_token=b"\x00\x00\xff\xff\xff\xff\xff\xff")
    assert refusal(caught.value)[:2] == ("FAILED_PRECONDITION", "READ_TOKEN_UNKNOWN")


async def test_an_open_transaction_delays_tokens_not_answers(pair: Pair, gateway: RunningGateway, tenant: str) -> None:
    await write(gateway.channel, tenant, "d", 1)
    with psycopg.connect(pair.primary.dsn(pair.name)) as connection:
        connection.execute("SELECT pg_current_xact_id()")
        token = await write(gateway.channel, tenant, "d", 2)
        pair.catch_up()
        answer = await latest(gateway.channel, tenant, "d", read_token=token, **REPORT)
        assert (answer.provenance.source, value_of(answer)) == (PRIMARY, 2)
        connection.rollback()


async def test_a_stale_replica_is_used_only_where_allowed(pair: Pair, gateway: RunningGateway, tenant: str) -> None:
    await write(gateway.channel, tenant, "d", 1)
    pair.catch_up()
    await source_fresh(gateway, tenant, "replica-1")
    pair.pause_replay()
    try:
        await source_fresh(gateway, tenant, "replica-1", fresh=False)
        answer = await latest(gateway.channel, tenant, "d", **DASHBOARD)
        assert answer.provenance.source == PRIMARY
        found = await ask(gateway.channel, tenant, query_pb2.GetFreshnessRequest())
        tiers = {t.tier: t.lookup_source for t in found.tiers}
        assert tiers[query_pb2.TIER_CRITICAL] == PRIMARY
        assert tiers[query_pb2.TIER_DASHBOARD] == PRIMARY
        assert tiers[query_pb2.TIER_REPORT] == REPLICA
    finally:
        pair.replica.resume_replay()
    await source_fresh(gateway, tenant, "replica-1")


async def from_the_primary(gateway: RunningGateway, tenant: str) -> None:
    """Ask for a dashboard until the primary answers."""
    while True:
        try:
            answer = await latest(gateway.channel, tenant, "d", **DASHBOARD)
        except grpc.aio.AioRpcError as error:
            log.warning("asked again after %s", refusal(error))
        else:
            if answer.provenance.source == PRIMARY:
                return
            log.warning("asked again after %s", answer.provenance)


async def test_a_broken_replica_cannot_crowd_the_primary(pair: Pair, gateway: RunningGateway, tenant: str) -> None:
    await write(gateway.channel, tenant, "d", 1)
    pair.catch_up()
    await source_fresh(gateway, tenant, "replica-1")
    pair.pause_replay()
    try:
        await source_fresh(gateway, tenant, "replica-1", fresh=False)
        with psycopg.connect(pair.primary.dsn(pair.name)) as connection:
            # Whoever reads now waits: as many as the gateway lets through stay there.
            connection.execute("LOCK TABLE latest_values IN ACCESS EXCLUSIVE MODE")
            # The pool has 4 connections, and as many dashboards may fall back: nobody waits for a connection.
            waiting = [asyncio.create_task(from_the_primary(gateway, tenant)) for _ in range(4)]
            crowded = "SELECT count(*) >= 4 FROM pg_locks WHERE NOT granted"
            await until(lambda: connection.execute(crowded).fetchone() == (True,), "four on the primary")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await latest(gateway.channel, tenant, "d", **DASHBOARD)
            assert refusal(caught.value) == ("RESOURCE_EXHAUSTED", "FALLBACK_CONCURRENCY", {"limit": "4"})
            answers: list[Any] = []

            async def answered() -> bool:
                try:
                    answers.append(await latest(gateway.channel, tenant, "d", allow_degraded=True, **DASHBOARD))
                except grpc.aio.AioRpcError as error:
                    # The replica did not begin within its second either.
                    assert refusal(error)[1] == "FALLBACK_CONCURRENCY"
                return bool(answers)

            await until(answered, "an answer for who takes a degraded one")
            assert answers[0].provenance.source == REPLICA
            assert [d.reason for d in answers[0].provenance.degraded] == [query_pb2.Degradation.REASON_STALE]
            connection.rollback()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*waiting)
    finally:
        pair.replica.resume_replay()
    await source_fresh(gateway, tenant, "replica-1")


async def test_a_replica_that_hangs_costs_nobody_an_answer(pair: Pair, gateway: RunningGateway, tenant: str) -> None:
    await write(gateway.channel, tenant, "d", 1)
    pair.catch_up()
    await source_fresh(gateway, tenant, "replica-1")

    async def left_alone() -> bool:
        answer = await latest(gateway.channel, tenant, "d", **REPORT)
        assert (answer.provenance.source, value_of(answer)) == (PRIMARY, 1)
        return [s.name for s in answer.provenance.plan.steps] == ["primary"]

    with hanging(pair.replica):
        await until(left_alone, "the replica is not even asked")
    await source_fresh(gateway, tenant, "replica-1")
    await latest_of_replica(gateway.channel, tenant, "d", **REPORT)


async def test_a_standby_in_the_place_of_the_primary_is_not_believed(pair: Pair, tenant: str) -> None:
    """As after a failover, while the name still leads to the server that was demoted."""
    database = Database(pair.primary, pair.name)
    async with running_gateway(database, query_dsn=pair.replica_dsn) as misled:
        await write(misled.channel, tenant, "d", 1)
        pair.catch_up()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await latest(misled.channel, tenant, "d", **CRITICAL)
        assert refusal(caught.value)[:2] == ("UNAVAILABLE", "STORAGE_UNAVAILABLE")


async def test_a_heartbeat_of_the_future_proves_nothing(pair: Pair, gateway: RunningGateway, tenant: str) -> None:
    """As a clock leaves it behind that is set back, or a failover to a primary whose clock is behind."""
    await write(gateway.channel, tenant, "d", 1)
    pair.catch_up()
    await source_fresh(gateway, tenant, "replica-1")
    beat_at = "SELECT beat_at > clock_timestamp() + interval '30 seconds' FROM heartbeat"
    with (
        psycopg.connect(pair.primary.dsn(pair.name), autocommit=True) as primary,
        psycopg.connect(pair.replica.dsn(pair.name), autocommit=True) as replica,
    ):
        deadline = time.monotonic() + PATIENCE_S
        # Until replay stands still at such a beat: the gateway's next one overwrites it.
        while replica.execute(beat_at).fetchone() != (True,):
            assert time.monotonic() < deadline
            pair.replica.resume_replay()
            with primary.transaction():
                primary.execute("UPDATE heartbeat SET beat_at = clock_timestamp() + interval '1 minute'")
                pair.catch_up()
            pair.pause_replay()
        try:
            await write(gateway.channel, tenant, "d", 2)
            for freshness in (DASHBOARD, REPORT, {**REPORT, "allow_degraded": True}):
                answer = await latest(gateway.channel, tenant, "d", **freshness)
                assert (answer.provenance.source, value_of(answer)) == (PRIMARY, 2)
        finally:
            pair.replica.resume_replay()
    await source_fresh(gateway, tenant, "replica-1")


async def test_bad_freshness_is_refused_by_type(gateway: RunningGateway, tenant: str) -> None:
    await write(gateway.channel, tenant, "d", 1)
    for freshness, field in (
        ({"max_staleness_us": -1}, "freshness.max_staleness_us"),
        ({"max_staleness_us": 2**62}, "freshness.max_staleness_us"),
        ({"tier": 77}, "freshness.tier"),
        ({"read_token": b"short"}, "freshness.read_token"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await latest(gateway.channel, tenant, "d", **freshness)
        assert refusal(caught.value) == ("INVALID_ARGUMENT", "FRESHNESS_INVALID", {"field": field})
