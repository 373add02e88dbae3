"""Tenants, devices, attributes, dictionaries and streams: found, or registered on first sight."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from atlasco.telemetry.v1 import ingest_pb2
from psycopg.types.json import Jsonb

from runtime.tasks import retrieve
from storage.database import Connection, Pool
from storage.errors import StorageDefect, translated
from storage.model import Attribute, ValueType
from storage.statements import statements

_SQL = statements("registry.sql")

# How long what an operator can change may be out of date in a gateway: short for windows, which somebody widens and
# then replays a file; longer for the attributes, of which there may be ten thousand to read.
_TENANT_S = 1.0
_ATTRIBUTES_S = 30.0
# Dictionaries remembered for one tenant: far above the firmware versions of any fleet.
_DICTIONARIES_PER_TENANT = 1_000


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer, with what binds its writes. Times in microseconds."""

    tenant_id: int
    name: str
    window_past_us: int
    window_future_us: int
    # Readings outside the window are set aside instead of rejected.
    quarantines: bool


@dataclass(frozen=True, slots=True)
class FixedSettings:
    """Numbers that are fixed for the life of the database."""

    buckets: int
    lanes: int


@dataclass(frozen=True, slots=True)
class AttributeWanted:
    """An attribute as a client defines it."""

    name: str
    type: ValueType
    unit: str = ""


@dataclass(frozen=True, slots=True)
class OpenedStream:
    """Where a device's stream stands after its hello."""

    entity_id: int
    epoch: int
    committed_sequence: int
    # Told before and not confirmed, oldest first; one for each message.
    unconfirmed: list[ingest_pb2.Ack]


@dataclass(slots=True)
class _Known:
    tenant: Tenant
    attributes: dict[str, Attribute]
    read_at: float
    attributes_read_at: float


class Registry:
    """The registry of one gateway, with a short-lived cache of tenants and attributes.

    `clock` gives seconds and never goes back. All methods raise StorageError when the database cannot answer.
    """

    def __init__(self, pool: Pool, *, register_tenants: bool, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._register_tenants = register_tenants
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._attributes: dict[int, Attribute] = {}
        # Under way, by name: a fleet that comes back reads a large tenant once.
        self._readings: dict[str, asyncio.Task[Tenant | None]] = {}

    async def settings(self) -> FixedSettings:
        """The numbers that writers must agree on."""
        row = await self._row("fixed_settings", {})
        if row is None:
            raise StorageDefect("the database has no settings: run `atlasco migrate`")
        return FixedSettings(buckets=row[0], lanes=row[1])

    async def tenant(self, name: str) -> Tenant | None:
        """A tenant; None when it is unknown and this gateway does not register tenants on first sight."""
        known = self._known.get(name)
        if known is not None and self._clock() - known.read_at < _TENANT_S:
            return known.tenant
        reading = self._readings.get(name)
        if reading is None:
            # A task of its own: who began it may be gone before those who share it.
            reading = asyncio.create_task(self._read_tenant(name), name="tenant")
            self._readings[name] = reading
            reading.add_done_callback(lambda ended: self._was_read(name, ended))
        return await asyncio.shield(reading)

    def _was_read(self, name: str, reading: "asyncio.Task[Tenant | None]") -> None:
        del self._readings[name]
        retrieve(reading)

    async def _read_tenant(self, name: str) -> Tenant | None:
        known = self._known.get(name)
        now = self._clock()
        row = await self._row("find_tenant", {"name": name})
        if row is None and self._register_tenants:
            await self._row("register_tenant", {"name": name})
            row = await self._row("find_tenant", {"name": name})
        if row is None:
            return None
        tenant = Tenant(*row)
        if known is not None and now - known.attributes_read_at < _ATTRIBUTES_S:
            known.tenant, known.read_at = tenant, now
            return tenant
        rows = await self._rows("attributes", {"tenant": tenant.tenant_id})
        attributes = [_attribute(row) for row in rows]
        self._known[name] = _Known(tenant, {a.name: a for a in attributes}, now, now)
        self._attributes.update({a.attribute_id: a for a in attributes})
        return tenant

    async def attributes(self, tenant: Tenant, wanted: Sequence[AttributeWanted]) -> dict[str, Attribute | str]:
        """Each wanted name with its attribute, registered if need be, or with a refusal: "unknown" or "quota".

        The type is that of the registered attribute, which may be another than the one wanted.
        """
        known = self._known[tenant.name].attributes
        missing = [attribute for attribute in wanted if attribute.name not in known]
        found: dict[str, Attribute | str] = {}
        if missing:
            rows = await self._rows(
                "register_attributes",
                {
                    "tenant": tenant.tenant_id,
                    "names": [attribute.name for attribute in missing],
                    "types": [str(attribute.type) for attribute in missing],
                    "units": [attribute.unit for attribute in missing],
                },
            )
            for row in rows:
                if row[4] is not None:
                    found[row[1]] = str(row[4])
                    continue
                attribute = _attribute(row)
                known[attribute.name] = attribute
                self._attributes[attribute.attribute_id] = attribute
        return {w.name: found.get(w.name) or known[w.name] for w in wanted}

    @property
    def attributes_by_id(self) -> Mapping[int, Attribute]:
        """The attributes that this gateway has met, of all tenants."""
        return self._attributes

    async def entity(self, tenant: Tenant, name: str, entity_type: str, labels: Mapping[str, str]) -> int | None:
        """A device's id; None when it is unknown and the tenant does not register devices on first sight."""
        row = await self._row(
            "register_entity",
            {"tenant": tenant.tenant_id, "name": name, "type": entity_type, "labels": Jsonb(dict(labels))},
        )
        return None if row is None else row[0]

    async def open_stream(
        self,
        tenant: Tenant,
        name: str,
        entity_type: str,
        labels: Mapping[str, str],
        session_id: UUID,
        *,
        most_unconfirmed: int,
    ) -> OpenedStream | None:
        """A device's hello; None as in `entity`. Waits for a write of the device that is under way elsewhere."""
        entity_id = await self.entity(tenant, name, entity_type, labels)
        if entity_id is None:
            return None
        key = {"tenant": tenant.tenant_id, "entity": entity_id, "session": session_id}
        with translated():
            async with self._pool.connection() as connection, connection.pipeline():
                opened = await connection.execute(_SQL["open_stream"], key)
                told = await connection.execute(_SQL["unconfirmed_rejections"], key | {"limit": most_unconfirmed})
                stands = await opened.fetchone()
                acks = await told.fetchall()
        if stands is None:
            raise StorageDefect("open_stream() gave no row")
        return OpenedStream(
            entity_id=entity_id,
            epoch=stands[0],
            committed_sequence=stands[1],
            unconfirmed=[ingest_pb2.Ack.FromString(bytes(row[0])) for row in acks],
        )

    async def confirm_rejections(self, tenant_id: int, entity_id: int, session_id: UUID, through: int) -> None:
        """Forget the rejections of a session's messages up to a sequence."""
        await self._execute(
            "confirm_rejections",
            {"tenant": tenant_id, "entity": entity_id, "session": session_id, "sequence": through},
        )

    async def find_dictionary(self, tenant: Tenant, dictionary_id: UUID) -> bytes | None:
        """The dictionary stored under an id, serialized and without the id."""
        key = {"tenant": tenant.tenant_id, "dictionary": dictionary_id}
        row = await self._row("find_dictionary", key)
        if row is None:
            return None
        await self._execute("touch_dictionary", key)
        return bytes(row[0])

    async def store_dictionary(self, tenant: Tenant, dictionary_id: UUID, definition: bytes) -> bytes:
        """Store a dictionary under an id, unless there is one; returns what is stored (or would be)."""
        key = {"tenant": tenant.tenant_id, "dictionary": dictionary_id}
        await self._execute("store_dictionary", key | {"definition": definition, "limit": _DICTIONARIES_PER_TENANT})
        row = await self._row("find_dictionary", key)
        return definition if row is None else bytes(row[0])

    async def _row(self, statement: str, parameters: Mapping[str, Any]) -> tuple[Any, ...] | None:
        with translated():
            async with self._pool.connection() as connection:
                return await (await connection.execute(_SQL[statement], parameters)).fetchone()

    async def _rows(self, statement: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        with translated():
            async with self._pool.connection() as connection:
                return await (await connection.execute(_SQL[statement], parameters)).fetchall()

    async def _execute(self, statement: str, parameters: Mapping[str, Any]) -> None:
        connection: Connection
        with translated():
            async with self._pool.connection() as connection:
                await connection.execute(_SQL[statement], parameters)


def _attribute(row: Sequence[Any]) -> Attribute:
    return Attribute(attribute_id=row[0], name=row[1], type=ValueType(row[2]), keeps_latest=row[3])
