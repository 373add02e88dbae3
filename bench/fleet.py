"""A large fleet: a million devices whose latest values a projection holds, for finding devices by conditions."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.history import columns, copy_latest, fill_all, make_entities, make_registry
from bench.kept import Say
from bench.stack import Stack
from storage.database import PoolSettings, Role, make_pool
from storage.model import ValueType
from storage.rollup.declare import create_projection

ATTRIBUTES = {
    "temperature": ValueType.DOUBLE,
    "load": ValueType.DOUBLE,
    "status": ValueType.TEXT,
    "firmware": ValueType.TEXT,
}
# How often each is, in a hundred.
STATUSES = {"active": 70, "idle": 20, "maintenance": 8, "fault": 2}
FIRMWARES = {f"{major}.{minor}.{patch}": share for major, minor, patch, share in (
    (1, 4, 2, 10), (1, 9, 0, 30), (2, 0, 1, 15), (2, 1, 0, 15), (2, 1, 3, 20), (3, 0, 0, 10),
)}  # fmt: skip
_BLOCK = 200_000


@dataclass(frozen=True, slots=True)
class Fleet:
    """So many devices: temperatures around 60 with a deviation of 12, independent of everything else."""

    devices: int
    version: int = 1

    @property
    def database(self) -> str:
        """See `Content`."""
        return f"bench_fleet_{self.devices}"

    def build(self, stack: Stack, say: Say) -> Mapping[str, Any]:
        """See `Content`."""
        end_us = time.time_ns() // 1000
        tenant, attributes = make_registry(stack, self.database, ATTRIBUTES)
        rng = np.random.default_rng(7)
        # Not in the order of names: a fleet registers as it is switched on.
        make_entities(stack, self.database, tenant, rng.permutation(self.devices), "machine")
        say(f"{self.devices:,} devices")
        with stack.admin(self.database) as connection:
            for at in range(0, self.devices, _BLOCK):
                entities = np.arange(at, min(at + _BLOCK, self.devices), dtype=np.int64) + 1
                for name, (attribute, value_type) in attributes.items():
                    readings = columns(tenant, entities, attribute, end_us, _values(name, len(entities), rng))
                    copy_latest(connection, value_type, readings)
            say("latest values; the projection")
            connection.execute("ANALYZE")
        asyncio.run(self._project(stack, tenant))
        say("vacuum")
        with stack.admin(self.database) as connection:
            connection.execute("VACUUM (ANALYZE)")
        self._check(stack)
        return {"start_us": end_us, "end_us": end_us}

    async def _project(self, stack: Stack, tenant: int) -> None:
        owner = make_pool(PoolSettings(stack.dsn(self.database, "postgres"), Role.MAINTAIN, max_size=1))
        await owner.open()
        try:
            await create_projection(owner, tenant, "condition", list(ATTRIBUTES))
        finally:
            await owner.close()
        await fill_all(stack, self.database)

    def _check(self, stack: Stack) -> None:
        with stack.admin(self.database) as connection:
            row = connection.execute("SELECT count(*) FROM projections.p1").fetchone()
        assert row == (self.devices,), f"the projection holds {row}"


def _values(name: str, count: int, rng: np.random.Generator) -> "np.ndarray[Any, Any]":
    match name:
        case "temperature":
            return rng.normal(60.0, 12.0, count)
        case "load":
            return rng.random(count)
    shares = STATUSES if name == "status" else FIRMWARES
    texts = np.array([text.encode() for text in shares], object)
    return texts[rng.choice(len(texts), count, p=np.array(list(shares.values())) / 100)]
