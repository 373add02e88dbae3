"""Leases and fences: who may work on a lane, and whose cursor counts."""

from dataclasses import replace

import pytest

from embedded.replica import StreamingReplica
from runtime.process import DependencyUnreachable, Shutdown
from storage.database import Pool
from storage.leases import Leases
from storage.relay.cursor import Page, after
from storage.relay.drain import LaneDrain, LaneLost, NotPrimary, PageLimits
from storage.relay.service import relay_pool
from tests.manual_clock import ManualClock
from tests.relay.relay_support import Bench
from tests.waiting import PATIENCE_S, until


async def prepare(pool: Pool) -> None:
    async with pool.connection() as connection:
        await connection.execute("INSERT INTO relay_lanes (lane) SELECT generate_series(0, 3) ON CONFLICT DO NOTHING")


async def test_members_get_equal_shares_and_give_up_what_is_too_much(pool: Pool) -> None:
    one = Leases(pool, "test", 5, 60.0, "one")
    two = Leases(pool, "test", 5, 60.0, "two")
    await one.open()
    assert sorted((await one.renew()).held) == [0, 1, 2, 3, 4]
    assert not (await two.renew()).held
    standing = await one.renew()
    assert len(standing.surplus) in (2, 3)
    await one.release(standing.surplus)
    assert sorted((await two.renew()).held) == sorted(standing.surplus)
    assert not (await one.renew()).surplus
    await two.leave()
    assert sorted((await one.renew()).held) == [0, 1, 2, 3, 4]


async def test_an_expired_lease_is_taken_over_with_a_larger_epoch(pool: Pool) -> None:
    clock = ManualClock()
    dead = Leases(pool, "test", 1, 0.2, "dead", clock=clock)
    heir = Leases(pool, "test", 1, 60.0, "heir")
    await dead.open()
    old = (await dead.renew()).held[0]
    assert dead.holds(old)
    clock.now_s = 0.2

    async def taken() -> bool:
        return bool((await heir.renew()).held)

    await until(taken, "the lease taken over")
    new = (await heir.renew()).held[0]
    assert new.epoch > old.epoch
    assert not dead.holds(old)
    assert not (await dead.renew()).held


async def test_a_lease_is_not_trusted_after_its_time_on_the_local_clock(pool: Pool) -> None:
    clock = ManualClock()
    leases = Leases(pool, "test", 1, 10.0, "one", clock=clock)
    await leases.open()
    lease = (await leases.renew()).held[0]
    clock.now_s = 9.9
    assert leases.holds(lease)
    clock.now_s = 10.0
    assert not leases.holds(lease)
    await leases.renew()
    assert leases.holds(lease)


async def test_who_lost_the_lane_cannot_move_its_cursor(bench: Bench, pool: Pool) -> None:
    await prepare(pool)
    bench.write(4)
    zombie = LaneDrain(pool, 0, 100, PageLimits())
    await zombie.adopt()
    page = await zombie.read("topic")
    assert isinstance(page, Page) and len(page.batches) == 1
    heir = LaneDrain(pool, 0, 101, PageLimits())
    await heir.adopt()
    with pytest.raises(LaneLost):
        await zombie.store(after(page, "topic"), page.place)
    with pytest.raises(LaneLost):
        await zombie.read("topic")
    with pytest.raises(LaneLost):
        await zombie.adopt()
    again = await heir.read("topic")
    assert isinstance(again, Page) and again.batches == page.batches
    await heir.store(after(again, "topic"), again.place)
    empty = await heir.read("topic")
    assert isinstance(empty, Page) and not empty.batches and empty.last


async def test_a_cursor_is_not_stored_on_a_server_it_was_not_read_from(bench: Bench, pool: Pool) -> None:
    await prepare(pool)
    bench.write(4)
    drain = LaneDrain(pool, 0, 100, PageLimits())
    await drain.adopt()
    page = await drain.read("topic")
    assert isinstance(page, Page)
    for other in (
        replace(page.place, timeline="0000002A"),
        replace(page.place, server="1"),
        replace(page.place, started=page.place.started.replace(year=2020)),
    ):
        with pytest.raises(LaneLost):
            await drain.store(after(page, "topic"), other)
    await drain.store(after(page, "topic"), page.place)


async def test_a_standby_is_refused(bench: Bench, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> None:
    await prepare(pool)
    await LaneDrain(pool, 0, 100, PageLimits()).adopt()
    with StreamingReplica(bench.postgres, tmp_path_factory.mktemp("replica")) as replica:
        standby = relay_pool(replica.dsn(bench.name))
        await standby.open()

        async def refused() -> bool:
            try:
                await LaneDrain(standby, 0, 100, PageLimits()).read("topic")
            except NotPrimary:
                return True
            except LaneLost:  # not replayed yet
                return False
            raise AssertionError("a standby was read")

        try:
            await until(refused, "the standby refused")
        finally:
            await standby.close()


async def test_a_database_that_is_not_there_ends_the_start(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.relay.service._START_TIMEOUT_S", 0.5)
    relay = bench.relay(dsn="host=127.0.0.1 port=1 dbname=x connect_timeout=1")
    with pytest.raises(DependencyUnreachable):
        await relay.run(Shutdown())


def test_a_relay_without_its_settings_says_which(bench: Bench) -> None:
    process = bench.relay_process(KAFKA_BOOTSTRAP_SERVERS="", ATLASCO_TOPIC_PARTITIONS="none")
    assert process.wait(PATIENCE_S) == 2
