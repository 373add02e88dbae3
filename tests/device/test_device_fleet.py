import asyncio
import dataclasses

import numpy as np
import pytest

from device.dictionary import Attribute, Dictionary, ValueType
from device.fleet import Fleet, FleetConfig, cadence, perfect
from device.kinds import KINDS
from device.ledger import Ledger
from device.outcomes import Rejected
from device.packing import Packed, PackingLimits, pack
from device.simulated import FaultRates, SimulatedDevice
from tests.device.reference_server import same
from tests.waiting import until

T0 = 1_790_000_000_000_000
TIMES = T0 + 1_000_000 * np.arange(50, dtype=np.int64)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind_is_believable(kind):
    model = kind.make(np.random.default_rng(3))
    first, second = model.sample(TIMES), model.sample(TIMES + 50_000_000)
    assert set(first) == {attribute.name for attribute in kind.attributes}
    python = {ValueType.DOUBLE: float, ValueType.INT64: int, ValueType.BOOL: bool, ValueType.STRING: str}
    for attribute in kind.attributes:
        values = first[attribute.name] + second[attribute.name]
        assert len(values) == 100
        assert {type(value) for value in values} == {python[attribute.type]}
    for counter in ("energy_wh", "energy_kwh", "odometer_m"):
        if counter in first:
            values = first[counter] + second[counter]
            assert values == sorted(values)
    assert {attribute.type for attribute in kind.attributes} == set(ValueType)


def test_equal_seeds_say_equal_things():
    limits, faults = PackingLimits(), FaultRates(0.5, 0.5, 0.5, 0.5, 0.5, 0.5)

    def said(seed):
        device = SimulatedDevice(2, seed=seed, faults=faults)
        return [device.messages(TIMES + 10**8 * i, limits) for i in range(10)]

    assert said(1) == said(1)
    assert said(1) != said(2)


@pytest.mark.parametrize(
    ("rate", "attributes", "expected"),
    [
        pytest.param(10.0, 10, (1, 1_000_000), id="one sample a second"),
        pytest.param(1.0, 10, (1, 10_000_000), id="slow"),
        pytest.param(100.0, 10, (10, 100_000), id="gathered"),
        pytest.param(100_000.0, 10, (10, 100), id="bounded by the message"),
        pytest.param(None, 7, (14, 200), id="full speed"),
    ],
)
def test_cadence(rate, attributes, expected):
    assert cadence(FleetConfig("x", rate=rate, readings_per_message=100), attributes) == expected


def rejection(ticket, index):
    return Rejected(ticket, index, "TYPE_MISMATCH", "", False, None, 1)


def test_a_ledger_counts_only_what_is_acked_and_not_rejected():
    dictionary = Dictionary([Attribute("v", ValueType.INT64)])
    ledger = Ledger("d", dictionary)

    def send(ticket, *readings):
        [packed] = pack([("v", time_us, value) for time_us, value in readings], dictionary, PackingLimits())
        ledger.sent(ticket, packed)

    send(1, (1, 10), (2, 20), (3, 30))
    send(2, (1, 11), (4, 40))
    send(3, (2, 21), (5, 50))
    ledger.acked(2)
    ledger.rejected([rejection(1, 2), rejection(2, 0)])
    # The correction of 1 was rejected; that of 2 has no answer; 3 was rejected.
    assert sorted(ledger.acked_readings()) == [("v", 1, 10), ("v", 4, 40)]
    assert set(ledger.uncertain_readings()) == {("v", 2), ("v", 5)}
    assert [reading.value for reading in ledger.rejected_readings()] == [30, 11]
    ledger.acked(3)
    assert sorted(ledger.acked_readings()) == [("v", 1, 10), ("v", 2, 21), ("v", 4, 40), ("v", 5, 50)]
    ledger.rejected([rejection(3, None)])
    assert sorted(ledger.acked_readings()) == [("v", 1, 10), ("v", 2, 20), ("v", 4, 40)]
    assert ledger.rejected_by_reason == {"TYPE_MISMATCH": 3}
    ledger.sent(4, Packed(b"", 0))


async def audit(server, fleet):
    """Every acked reading is stored with its value, and nothing else is."""
    for device_id, ledger in fleet.ledgers().items():
        stored = await server.readings(device_id)
        acked = {(name, time_us): value for name, time_us, value in ledger.acked_readings()}
        assert not set(ledger.uncertain_readings())
        assert acked.keys() == stored.keys()
        assert all(same(value, stored[key]) for key, value in acked.items())


async def test_ledgers_agree_with_the_server_through_faults_and_disconnects(server):
    config = FleetConfig(
        server.target,
        devices=20,
        duration_s=None,
        rate=400.0,
        connections=2,
        message_interval_s=0.05,
        faults=FaultRates(0.2, 0.05, 0.05, 0.05, 0.2, 0.2),
        disconnect_every_s=0.2,
        disconnect_share=0.5,
    )
    fleet = Fleet(config)

    def seen_enough():
        now = fleet.statistics()
        return now.acked > 10_000 and now.rejected and now.resent and now.reconnects

    running = asyncio.create_task(fleet.run())
    try:
        await until(seen_enough, "readings are acked, rejected and sent again", beside=running)
    finally:
        fleet.stop()
    statistics = await running
    await audit(server, fleet)
    assert statistics.unacked == 0
    assert statistics.rejected == sum(statistics.rejected_by_reason.values()) > 0
    assert statistics.sent == statistics.acked + statistics.rejected
    assert 0 < statistics.ack_p50_ms <= statistics.ack_p99_ms


async def test_a_perfect_fleet_at_full_speed(server):
    fleet = Fleet(perfect(FleetConfig(server.target, devices=4, duration_s=0.3, rate=None)))
    statistics = await fleet.run()
    await audit(server, fleet)
    assert (statistics.rejected, statistics.unacked, statistics.resent) == (0, 0, 0)


async def test_a_fleet_can_be_stopped_early(server):
    fleet = Fleet(dataclasses.replace(FleetConfig(server.target, devices=2), duration_s=None))
    fleet.stop()
    assert (await fleet.run()).unacked == 0
