"""Random batches against a model in a dictionary: history, latest values and the replayed outbox must all equal it."""

import math
import random
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from storage.arrange import differ
from storage.model import Outcome
from tests.storage.conftest import Database
from tests.storage.test_commit import T0, Key, Sent, Site, plain, site_of

VALUES: dict[str, list[Any]] = {
    "d": [1.0, 2.0, math.nan, math.inf, 0.0, -0.0],
    "i": [1, 2**63 - 1, -(2**63)],
    "s": ["", "a", "käse"],
    "b": [True, False],
    # Keeps no latest value.
    "d-none": [1.0, 2.0],
}


@pytest.fixture
async def site(module_database: Database, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    async with site_of(module_database, request.node.name) as made:
        made.attribute("d-none", keeps_latest=False)
        yield made


class Model:
    """What the database should hold: the rules, said in the slowest way."""

    def __init__(self) -> None:
        self.history: dict[Key, tuple[Any, int]] = {}
        self.latest: dict[tuple[str, str], tuple[int, Any]] = {}
        self.changes = 0

    def write(self, sent: list[Sent]) -> None:
        last: dict[Key, tuple[Any, bool]] = {}
        for message in sent:
            for name, time_us, value in message.readings:
                last[message.device, name, time_us] = (value, message.historical or name == "d-none")
        for (device, name, time_us), (value, historical) in sorted(last.items(), key=lambda item: item[0]):
            stored = self.history.get((device, name, time_us))
            if stored is None:
                self.history[device, name, time_us] = (value, 0)
            elif differ(stored[0], value):
                self.history[device, name, time_us] = (value, stored[1] + 1)
            self.changes += stored is None or differ(stored[0], value)
            held = self.latest.get((device, name))
            if (held is not None and held[0] == time_us and differ(held[1], value)) or (
                not historical and (held is None or time_us > held[0])
            ):
                self.latest[device, name] = (time_us, value)


def some_readings(random_: random.Random) -> list[tuple[str, int, Any]]:
    names = random_.choices(list(VALUES), k=random_.randrange(8))
    return [(name, T0 + random_.randrange(5), random_.choice(VALUES[name])) for name in names]


@pytest.mark.parametrize("seed", range(6))
async def test_the_database_is_what_the_model_says(site: Site, seed: int) -> None:
    random_ = random.Random(seed)
    model = Model()
    writers = [site.writer() for _ in range(2)]
    # device -> session -> (epoch, next sequence)
    streams: dict[str, tuple[UUID, int, int]] = {}
    sent_before: list[Sent] = []
    changes = 0
    for _ in range(40):
        batch: list[Sent] = []
        fresh: list[Sent] = []
        for device in random_.sample(["pump", "fan", "valve"], random_.randrange(1, 4)):
            if device not in streams or random_.random() < 0.1:
                # A stream of another session, from somewhere else: the device's older one is over.
                session = uuid4()
                streams[device] = (session, site.hello(device, session)[0], 1)
            session, epoch, sequence = streams[device]
            for _ in range(random_.randrange(3)):
                fresh.append(
                    Sent(device, some_readings(random_), epoch, sequence, session, historical=random_.random() < 0.3)
                )
                sequence += 1
            streams[device] = (session, epoch, sequence)
        old = random_.sample(sent_before, min(2, len(sent_before))) if random_.random() < 0.4 else []
        batch = [*old, *fresh]
        if random_.random() < 0.2:
            unary = Sent("fan", some_readings(random_), historical=random_.random() < 0.5)
            batch.append(unary)
            model.write([*fresh, unary])
        else:
            model.write(fresh)
        written = await random_.choice(writers).write(site.batch(*batch, lane=random_.randrange(4)))
        assert all(outcome is not Outcome.COMMITTED for outcome in written.outcomes[: len(old)])
        assert all(outcome is Outcome.COMMITTED for outcome in written.outcomes[len(old) :])
        changes += written.changes
        sent_before += fresh
    assert site.history() == {key: (plain(value), revision) for key, (value, revision) in model.history.items()}
    assert site.latest() == {key: (time_us, plain(value)) for key, (time_us, value) in model.latest.items()}
    assert site.replayed() == site.history()
    assert changes == model.changes == len(site.outbox())
