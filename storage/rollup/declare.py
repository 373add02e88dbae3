"""What tenants declare: rollups and projections, created, listed and dropped. For RPC and command line alike."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from storage.database import Pool
from storage.errors import StorageError, translated
from storage.model import Attribute, ValueType
from storage.reads.model import AttributeNotFound, LatestNotKept
from storage.statements import statements

_SQL = statements("declarations.sql")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")

MAX_DECLARATIONS: Final = 16
"""The most rollups, and the most projections, of a tenant."""

MAX_ROLLUP_ATTRIBUTES: Final = 1_000
MAX_PROJECTION_ATTRIBUTES: Final = 64


class DeclarationInvalid(StorageError):
    """A name, or a number of attributes, is out of bounds; `field` says which."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field
        self.problem = problem


class NotNumeric(StorageError):
    """A rollup is asked for an attribute that is no number."""

    def __init__(self, name: str) -> None:
        super().__init__(f"attribute {name!r} is no number, and only numbers can be rolled up")
        self.name = name


class DeclarationExists(StorageError):
    """Another declaration has the name."""


class DeclarationNotFound(StorageError):
    """The tenant has no declaration of the name."""


class DeclarationQuota(StorageError):
    """The tenant has as many declarations as it may."""

    limit = MAX_DECLARATIONS


@dataclass(frozen=True, slots=True)
class Status:
    """Where a declaration stands: pending, backfilling, serving, failed or dropping.

    Failed: the worker could not keep it up, `problem` says why, and it is filled anew after a rest.
    `as_of`: it holds everything committed before; None: not known yet. `complete_from`: the reading time from which
    it is filled; None: from the beginning, or nothing is yet. `backfilled`: 0 to 1. `rows` is an estimate; None: not
    counted.
    """

    state: str
    as_of: datetime | None
    complete_from: datetime | None
    backfilled: float
    rows: int | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class RollupEntry:
    """A rollup as declared, and where it stands."""

    name: str
    attributes: Sequence[str]
    backfill_from: datetime | None
    created_at: datetime
    status: Status


@dataclass(frozen=True, slots=True)
class ProjectionEntry:
    """A projection as declared, and where it stands."""

    name: str
    # Empty: every type.
    entity_type: str
    attributes: Sequence[str]
    created_at: datetime
    status: Status


async def create_rollup(
    pool: Pool, tenant_id: int, name: str, attributes: Sequence[str], backfill_from: datetime | None = None
) -> RollupEntry:
    """Declare a rollup; the same declaration again returns what is there.

    Raises:
        DeclarationInvalid, AttributeNotFound, NotNumeric, DeclarationExists, DeclarationQuota, StorageError.
    """
    found = await _checked(pool, tenant_id, name, attributes, MAX_ROLLUP_ATTRIBUTES)
    for attribute in found:
        if attribute.type not in (ValueType.DOUBLE, ValueType.BIGINT):
            raise NotNumeric(attribute.name)
    ids = sorted(a.attribute_id for a in found)
    parameters = {"tenant": tenant_id, "name": name, "attributes": ids, "backfill_from": backfill_from}
    _judge(name, await _scalar(pool, "create_rollup", parameters))
    return await find_rollup(pool, tenant_id, name)


async def create_projection(
    pool: Pool, tenant_id: int, name: str, attributes: Sequence[str], entity_type: str = ""
) -> ProjectionEntry:
    """Declare a projection; the same declaration again returns what is there.

    Raises:
        DeclarationInvalid, AttributeNotFound, LatestNotKept, DeclarationExists, DeclarationQuota, StorageError.
    """
    found = await _checked(pool, tenant_id, name, attributes, MAX_PROJECTION_ATTRIBUTES)
    for attribute in found:
        if not attribute.keeps_latest:
            raise LatestNotKept(attribute.name)
    ids = sorted(a.attribute_id for a in found)
    parameters = {"tenant": tenant_id, "name": name, "type": entity_type, "attributes": ids}
    _judge(name, await _scalar(pool, "create_projection", parameters))
    return await find_projection(pool, tenant_id, name)


async def list_rollups(pool: Pool, tenant_id: int, name: str | None = None) -> list[RollupEntry]:
    """A tenant's rollups, or the one of the name, by name. Raises StorageError."""
    return [
        RollupEntry(
            name=row[0],
            attributes=row[1] or [],
            backfill_from=row[2],
            created_at=row[3],
            status=_status(row[4], row[5], row[6], row[7], row[8], None),
        )
        for row in await _rows(pool, "rollups", {"tenant": tenant_id, "name": name})
    ]


async def list_projections(pool: Pool, tenant_id: int, name: str | None = None) -> list[ProjectionEntry]:
    """A tenant's projections, or the one of the name, by name. Raises StorageError."""
    return [
        ProjectionEntry(
            name=row[0],
            entity_type=row[1],
            attributes=row[2] or [],
            created_at=row[3],
            status=_status(row[4], row[5], row[6], None, row[7], row[8]),
        )
        for row in await _rows(pool, "projections", {"tenant": tenant_id, "name": name})
    ]


async def find_rollup(pool: Pool, tenant_id: int, name: str) -> RollupEntry:
    """The rollup of a name. Raises DeclarationNotFound, StorageError."""
    for entry in await list_rollups(pool, tenant_id, name):
        return entry
    raise DeclarationNotFound(f"no rollup named {name!r}")


async def find_projection(pool: Pool, tenant_id: int, name: str) -> ProjectionEntry:
    """The projection of a name. Raises DeclarationNotFound, StorageError."""
    for entry in await list_projections(pool, tenant_id, name):
        return entry
    raise DeclarationNotFound(f"no projection named {name!r}")


async def drop_rollup(pool: Pool, tenant_id: int, name: str) -> None:
    """Take a rollup out of use; its rows go in the background. Raises DeclarationNotFound, StorageError."""
    if not await _scalar(pool, "drop_rollup", {"tenant": tenant_id, "name": name}):
        raise DeclarationNotFound(f"no rollup named {name!r}")


async def drop_projection(pool: Pool, tenant_id: int, name: str) -> None:
    """Take a projection out of use; its table goes in the background. Raises DeclarationNotFound, StorageError."""
    if not await _scalar(pool, "drop_projection", {"tenant": tenant_id, "name": name}):
        raise DeclarationNotFound(f"no projection named {name!r}")


def _status(
    stored: str,
    problem: str,
    as_of: datetime | None,
    complete_from: datetime | None,
    backfilled: float,
    rows: int | None,
) -> Status:
    # A worker of an older release leaves the problem where it is when it fills again.
    if problem and stored == "pending":
        return Status("failed", as_of, complete_from, backfilled, rows, problem)
    return Status(stored, as_of, complete_from, backfilled, rows)


def _judge(name: str, outcome: str) -> None:
    if outcome == "exists":
        raise DeclarationExists(f"another declaration is named {name!r}, or this one is being dropped")
    if outcome == "quota":
        raise DeclarationQuota(f"a tenant may declare {MAX_DECLARATIONS}, and has as many")


async def _checked(pool: Pool, tenant_id: int, name: str, attributes: Sequence[str], most: int) -> list[Attribute]:
    if not _NAME.fullmatch(name):
        raise DeclarationInvalid("name", "must be 1 to 63 of a-z, 0-9 and _, beginning with a letter")
    if not 1 <= len(attributes) <= most:
        raise DeclarationInvalid("attributes", f"must be 1 to {most}")
    if len(set(attributes)) < len(attributes):
        raise DeclarationInvalid("attributes", "must each be named once")
    rows = await _rows(pool, "attributes", {"tenant": tenant_id, "names": list(attributes)})
    found = {row[1]: Attribute(row[0], row[1], ValueType(row[2]), row[3]) for row in rows}
    for attribute in attributes:
        if attribute not in found:
            raise AttributeNotFound(attribute)
    return list(found.values())


async def _rows(pool: Pool, statement: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
    with translated():
        async with pool.connection() as connection:
            return await (await connection.execute(_SQL[statement], parameters)).fetchall()


async def _scalar(pool: Pool, statement: str, parameters: dict[str, Any]) -> Any:
    return (await _rows(pool, statement, parameters))[0][0]
