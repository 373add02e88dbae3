"""What operators do with tenants: make them, change what binds them, register devices and attributes by command.

Gateways keep what is changed here in a cache of seconds, so a change is in force a little later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Literal, Self

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from storage.database import Connection, Role, connection_info
from storage.errors import StorageError, translated
from storage.model import ValueType
from storage.statements import statements

_ROWS_PER_DELETE = 5_000
_MAX_DURATION_S = 100 * 366 * 86400.0

OutsideWindow = Literal["reject", "quarantine"]


class NotFound(StorageError):
    """There is no tenant, device or attribute of this name."""


class AlreadyThere(StorageError):
    """What was to be made exists, and differs or was not expected to."""


class SettingRefused(StorageError):
    """A setting is out of bounds, alone or together with another."""


class QuotaReached(StorageError):
    """The tenant has as many attributes as it may."""


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """What binds a tenant. None leaves a setting as it is (or, for a new tenant, at its default)."""

    # Durations in seconds.
    retention_s: float | None = None
    window_past_s: float | None = None
    window_future_s: float | None = None
    outside_window: OutsideWindow | None = None
    attribute_quota: int | None = None
    register_entities: bool | None = None
    register_attributes: bool | None = None


@dataclass(frozen=True, slots=True)
class TenantRow:
    """A tenant as it stands. Durations in seconds."""

    tenant_id: int
    name: str
    # In a customer partition of its own.
    dedicated: bool
    retention_s: float
    window_past_s: float
    window_future_s: float
    outside_window: str
    attribute_quota: int
    register_entities: bool
    register_attributes: bool
    created_at: datetime
    devices: int
    attributes: int
    quarantined: int
    # Of its customer partition: live time ranges, and the end of the newest retired one (readings before it are
    # gone and stay refused, whatever the retention becomes).
    ranges: int
    retired_to: datetime | None
    # Readings before this time may be gone, whatever the retention says since; None: there is no such time.
    kept_from: datetime | None


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A registered device."""

    entity_id: int
    external_id: str
    entity_type: str
    labels: Mapping[str, str]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class AttributeRow:
    """A registered attribute."""

    attribute_id: int
    name: str
    type: ValueType
    unit: str
    keeps_latest: bool
    created_at: datetime


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """A reading that was set aside. Device and attribute are None when they were deleted since."""

    quarantine_id: int
    device: str | None
    attribute: str | None
    ts: datetime
    value: object
    reason: str
    received_at: datetime


class Administration:
    """A connection as the owner of the schema, and what it can do. Every method is one transaction, save those that
    delete: they work in pieces and, interrupted, are simply called again.

        async with Administration(dsn) as administration:
            await administration.create_tenant("acme", TenantSettings(retention_s=30 * 86400))

    Every method raises StorageError when the database cannot be reached or refuses.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._sql = statements("administration.sql")
        self._open: Connection | None = None

    async def __aenter__(self) -> Self:
        with translated():
            self._open = await psycopg.AsyncConnection.connect(
                connection_info(self._dsn, Role.MAINTAIN), autocommit=True
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            await self._open.close()

    # -- tenants

    async def create_tenant(
        self, name: str, settings: TenantSettings | None = None, *, dedicated: bool = False
    ) -> TenantRow:
        """Make a tenant; `dedicated` gives it a customer partition of its own, for good.

        Raises:
            AlreadyThere: a tenant of this name exists.
            SettingRefused: the name or a setting is out of bounds.
        """
        with translated():
            async with self._connection.transaction():
                if await self._rows("tenant_id", [name]):
                    raise AlreadyThere(f"tenant {name!r} exists; `atlasco tenant set` changes it")
                try:
                    await self._rows("register_tenant", [name, dedicated])
                except psycopg.errors.CheckViolation as error:
                    raise SettingRefused(
                        "a tenant's name is 1 to 128 bytes of UTF-8 without control characters"
                    ) from error
                return await self._set(name, settings or TenantSettings())

    async def set_tenant(self, name: str, settings: TenantSettings) -> TenantRow:
        """Change what binds a tenant.

        Raises:
            NotFound: no such tenant.
            SettingRefused: a setting is out of bounds, or retention would be shorter than the window.
        """
        with translated():
            async with self._connection.transaction():
                return await self._set(name, settings)

    async def tenants(self) -> list[TenantRow]:
        """All tenants by name."""
        with translated():
            return [_tenant_row(row) for row in await self._rows("tenants", {"name": None})]

    async def tenant(self, name: str) -> TenantRow:
        """One tenant.

        Raises:
            NotFound: no such tenant.
        """
        with translated():
            rows = await self._rows("tenants", {"name": name})
        if not rows:
            raise no_tenant(name)
        return _tenant_row(rows[0])

    async def _set(self, name: str, settings: TenantSettings) -> TenantRow:
        values = {
            "name": name,
            "retention": _interval("retention", settings.retention_s),
            "window_past": _interval("window-past", settings.window_past_s),
            "window_future": _interval("window-future", settings.window_future_s),
            "outside_window": settings.outside_window,
            "attribute_quota": settings.attribute_quota,
            "register_entities": settings.register_entities,
            "register_attributes": settings.register_attributes,
        }
        try:
            rows = await self._rows("set_tenant", values)
        except (psycopg.errors.CheckViolation, psycopg.errors.NumericValueOutOfRange) as error:
            text = _BOUNDS.get(error.diag.constraint_name or "", error.diag.message_primary or str(error))
            raise SettingRefused(text) from error
        if not rows:
            raise no_tenant(name)
        return await self.tenant(name)

    # -- devices

    async def add_device(
        self, tenant: str, device: str, *, entity_type: str = "", labels: Mapping[str, str] | None = None
    ) -> int:
        """Register a device, whether or not the tenant registers them on first sight; returns its id.

        Raises:
            NotFound: no such tenant.
            AlreadyThere: the device is registered.
            SettingRefused: the name is out of bounds.
        """
        with translated():
            async with self._connection.transaction():
                tenant_id = await self._tenant_id(tenant)
                if await self._rows("entity_id", [tenant_id, device]):
                    raise AlreadyThere(f"device {device!r} of tenant {tenant!r} is registered")
                try:
                    row = await self._rows(
                        "register_entity", [tenant_id, device, entity_type, Jsonb(dict(labels or {}))]
                    )
                except psycopg.errors.CheckViolation as error:
                    raise SettingRefused(
                        "a device's name is 1 to 128 bytes of UTF-8 without control characters"
                    ) from error
                return int(row[0][0])

    async def devices(
        self, tenant: str, *, entity_type: str | None = None, after: str = "", limit: int = 100
    ) -> list[DeviceRow]:
        """Devices by name, those after the name `after`.

        Raises:
            NotFound: no such tenant.
        """
        with translated():
            asked = {"tenant": await self._tenant_id(tenant), "after": after, "type": entity_type, "limit": limit}
            return [DeviceRow(*row) for row in await self._rows("devices", asked)]

    # -- attributes

    async def add_attribute(
        self, tenant: str, name: str, value_type: ValueType, *, unit: str = "", keeps_latest: bool = True
    ) -> int:
        """Register an attribute, whether or not the tenant registers them on first sight; returns its id.

        Raises:
            NotFound: no such tenant.
            AlreadyThere: the attribute is registered.
            QuotaReached: the tenant may have no more attributes.
            SettingRefused: the name or the unit is out of bounds.
        """
        with translated():
            async with self._connection.transaction():
                tenant_id = await self._tenant_id(tenant)
                if known := await self._rows("attribute", [tenant_id, name]):
                    raise AlreadyThere(
                        f"attribute {name!r} of tenant {tenant!r} is registered, with type {known[0][1]}"
                    )
                try:
                    row = await self._rows("register_attribute", [tenant_id, name, value_type.value, unit])
                except psycopg.errors.CheckViolation as error:
                    raise SettingRefused(
                        "an attribute's name is 1 to 128 bytes of UTF-8 without control characters, "
                        "its unit at most 32 bytes"
                    ) from error
                attribute_id, _, refusal = row[0]
                if refusal is not None:
                    raise QuotaReached(
                        f"tenant {tenant!r} has all the attributes its quota allows; "
                        "`atlasco tenant set --attribute-quota` raises it"
                    )
                if not keeps_latest:
                    await self._run("set_keeps_latest", [False, tenant_id, attribute_id])
                return int(attribute_id)

    async def set_attribute(
        self, tenant: str, name: str, *, keeps_latest: bool | None = None, unit: str | None = None
    ) -> int:
        """Change an attribute; returns how many latest values were removed.

        A change of `keeps_latest` removes what is held: without upkeep it would be stale. Switched on, the latest
        value of a device is there from its next reading on. Gateways notice within their cache's time; a latest
        value that one of them still writes after a switching off is not shown, and goes when it is switched on.

        Raises:
            NotFound: no such tenant or attribute.
            SettingRefused: the unit is too long.
        """
        removed = 0
        with translated():
            tenant_id = await self._tenant_id(tenant)
            rows = await self._rows("attribute", [tenant_id, name])
            if not rows:
                raise NotFound(
                    f"tenant {tenant!r} has no attribute {name!r}; `atlasco tenant attribute list` shows them"
                )
            attribute_id, _, kept = rows[0]
            if unit is not None:
                try:
                    await self._run("set_unit", [unit, tenant_id, attribute_id])
                except psycopg.errors.CheckViolation as error:
                    raise SettingRefused("a unit is at most 32 bytes") from error
            if keeps_latest is None or keeps_latest == kept:
                return 0
            # Off before the removal, on after it: in between nothing stale is shown.
            if not keeps_latest:
                await self._run("set_keeps_latest", [False, tenant_id, attribute_id])
            while count := await self._run("delete_latest_of_attribute", [tenant_id, attribute_id, _ROWS_PER_DELETE]):
                removed += count
            if keeps_latest:
                await self._run("set_keeps_latest", [True, tenant_id, attribute_id])
        return removed

    async def attributes(self, tenant: str) -> list[AttributeRow]:
        """A tenant's attributes by name.

        Raises:
            NotFound: no such tenant.
        """
        with translated():
            rows = await self._rows("attributes", [await self._tenant_id(tenant)])
        return [AttributeRow(row[0], row[1], ValueType(row[2]), *row[3:]) for row in rows]

    # -- quarantine

    async def quarantined(self, tenant: str, *, after: int = 0, limit: int = 100) -> list[QuarantinedRow]:
        """Readings that were set aside, in the order they came, those after the id `after`.

        Raises:
            NotFound: no such tenant.
        """
        with translated():
            asked = {"tenant": await self._tenant_id(tenant), "after": after, "limit": limit}
            return [QuarantinedRow(*row) for row in await self._rows("quarantined", asked)]

    async def discard_quarantined(
        self, tenant: str, *, ids: Sequence[int] | None = None, received_before: datetime | None = None
    ) -> int:
        """Delete readings that were set aside: all, or those of `ids`, or those received before a time.

        What comes in while this runs is kept. Returns how many were deleted.

        Raises:
            NotFound: no such tenant.
        """
        discarded, after = 0, 0
        with translated():
            tenant_id = await self._tenant_id(tenant)
            before = received_before or (await self._rows("now", []))[0][0]
            while True:
                deleted = await self._rows(
                    "discard_quarantined",
                    {
                        "tenant": tenant_id,
                        "after": after,
                        "ids": None if ids is None else list(ids),
                        "before": before,
                        "limit": _ROWS_PER_DELETE,
                    },
                )
                if not deleted:
                    return discarded
                discarded += len(deleted)
                after = max(row[0] for row in deleted)

    # -- statements

    @property
    def _connection(self) -> Connection:
        if self._open is None:
            raise RuntimeError("Administration is used in an `async with` block")
        return self._open

    async def _tenant_id(self, name: str) -> int:
        rows = await self._rows("tenant_id", [name])
        if not rows:
            raise no_tenant(name)
        return int(rows[0][0])

    async def _rows(self, statement: str, parameters: Sequence[object] | Mapping[str, object]) -> list[tuple[Any, ...]]:
        return await (await self._connection.execute(sql.SQL(self._sql[statement]), parameters)).fetchall()

    async def _run(self, statement: str, parameters: Sequence[object]) -> int:
        return (await self._connection.execute(sql.SQL(self._sql[statement]), parameters)).rowcount


_BOUNDS = {
    "retention_covers_window": "retention must be at least window-past: change both, or the window first",
    "tenants_window_past_check": "window-past must be between 1 minute and 100 years",
    "tenants_window_future_check": "window-future must be between 0 and 7 days",
    "tenants_retention_check": "retention must be at most 100 years",
    "tenants_outside_window_check": "outside-window must be reject or quarantine",
    "tenants_attribute_quota_check": "attribute-quota must be 0 or more",
}


def no_tenant(name: str) -> NotFound:
    """The error for a tenant that does not exist."""
    return NotFound(f"there is no tenant {name!r}; `atlasco tenant list` shows them, `atlasco tenant create` makes one")


def _interval(name: str, seconds: float | None) -> timedelta | None:
    if seconds is None:
        return None
    if not 0 <= seconds <= _MAX_DURATION_S:
        raise SettingRefused(f"{name} must be between 0 and 100 years")
    return timedelta(seconds=seconds)


def _tenant_row(row: tuple[Any, ...]) -> TenantRow:
    plain: list[Any] = [value.total_seconds() if isinstance(value, timedelta) else value for value in row]
    return TenantRow(*plain)
