"""The audit: do PostgreSQL, the log and the warehouse hold the same readings, each once?

Readings are compared per tenant and hour of reading time, by count and by a checksum that does not depend on order: the
sum, modulo 2^64, of a 64-bit digest of each reading (key, type, value and revision). Where the hour differs, the first
reading that does is named.

Compared is where PostgreSQL's history is whole (within the tenant's retention) and so is the other store's (it says
from where). Within these bounds everything counts, also what lies outside of the times that PostgreSQL has readings of.

The stores move while they are compared. A warehouse lags; so a difference counts only when it is still there after the
warehouse has become complete through the moment at which PostgreSQL was read.
"""

import hashlib
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString, Protocol, TypeAlias

import psycopg

from storage.errors import StorageError, translated
from storage.model import ValueType
from storage.statements import statements
from storage.times import HOUR_US, moment, naive, naive_microseconds
from storage.warehouse.columns import GONE, resolved_relation
from storage.warehouse.port import Scope, Warehouse

_LAST_US = 253_370_764_800_000_000
"""The year 9999: past every reading."""
_IDS_PER_QUESTION = 500
_SQL = statements("verify.sql")

Key: TypeAlias = tuple[ValueType, int, int, int]
"""Type, entity id, attribute id, timestamp in microseconds."""
Held: TypeAlias = tuple[Any, int]
"""Value and revision."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What one store holds of one tenant's hour."""

    readings: int = 0
    checksum: int = 0

    def __add__(self, other: "Fingerprint") -> "Fingerprint":
        return Fingerprint(self.readings + other.readings, (self.checksum + other.checksum) & 0xFFFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True, slots=True)
class Difference:
    """A reading on which two stores disagree; `one` or `other` is None where the store does not have it."""

    tenant: str
    hour_us: int
    store: str
    key: Key
    one: Held | None
    other: Held | None

    def __str__(self) -> str:
        value_type, entity_id, attribute_id, time_us = self.key
        when = moment(time_us).isoformat()
        return (
            f"tenant {self.tenant}, device {entity_id}, attribute {attribute_id} ({value_type}), {when}: "
            f"PostgreSQL has {_shown(self.one)}, the {self.store} has {_shown(self.other)}"
        )


@dataclass(frozen=True, slots=True)
class HourAudit:
    """One tenant's hour in PostgreSQL and in another store."""

    tenant: str
    hour_us: int
    primary: Fingerprint
    other: Fingerprint

    @property
    def equal(self) -> bool:
        """Whether both hold the same readings, as far as a checksum can tell."""
        return self.primary == self.other


class Store(Protocol):
    """Where readings are, to be compared with PostgreSQL."""

    name: str

    def wait_for(self, through_us: int, deadline: float) -> None:
        """Wait until everything committed before `through_us` (the primary's clock) is here.

        Raises:
            VerifyTimeout: it was not by `deadline`, on `time.monotonic`.
        """
        ...

    def readings(self, tenant_id: int, from_us: int, to_us: int) -> Iterator[tuple[Key, Held]]:
        """The readings of a tenant with timestamps in [from_us, to_us), in any order; a reading that is here twice
        comes twice."""
        ...

    def complete_from_us(self, tenant_id: int) -> int | None:
        """The reading time before which retention has removed readings from here; None: never."""
        ...

    def names(self, tenant_id: int) -> Mapping[int, str]:
        """What the store calls devices, by id; empty where it keeps no names."""
        ...

    def remains(self, tenant_id: int, entity_ids: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Of these devices, which are deleted, what is here all the same: id and description, such as "3 readings"."""
        ...


class VerifyTimeout(StorageError):
    """A store did not become complete in time; nothing can be said about it."""


def digest(key: Key, held: Held) -> int:
    """64 bits that stand for one reading."""
    value_type, entity_id, attribute_id, time_us = key
    value, revision = held
    match value_type:
        case ValueType.DOUBLE:
            # All NaNs are one value, and so are both zeros, as PostgreSQL compares them.
            number = float(value)
            content = b"nan" if number != number else struct.pack("<d", number + 0.0)  # noqa: PLR0124
        case ValueType.BIGINT:
            content = struct.pack("<q", value)
        case ValueType.BOOLEAN:
            content = b"1" if value else b"0"
        case ValueType.TEXT:
            content = str(value).encode()
    head = struct.pack("<qiqi", entity_id, attribute_id, time_us, revision)
    return int.from_bytes(hashlib.blake2b(head + value_type.encode() + content, digest_size=8).digest(), "little")


def fingerprints(readings: Iterable[tuple[Key, Held]]) -> dict[int, Fingerprint]:
    """The fingerprint of each hour (microseconds of its start) that has readings."""
    hours: dict[int, list[int]] = {}
    for key, held in readings:
        counts = hours.setdefault(key[3] - key[3] % HOUR_US, [0, 0])
        counts[0] += 1
        counts[1] += digest(key, held)
    return {hour: Fingerprint(n, checksum & 0xFFFF_FFFF_FFFF_FFFF) for hour, (n, checksum) in hours.items()}


def first_difference(
    tenant: str, hour_us: int, store: str, one: Iterable[tuple[Key, Held]], other: Iterable[tuple[Key, Held]]
) -> Difference | None:
    """The first reading, by key, on which two stores disagree; a reading that is there twice disagrees too."""
    held: dict[Key, list[Held]] = {}
    for key, value in one:
        held.setdefault(key, []).append(value)
    found: dict[Key, list[Held]] = {}
    for key, value in other:
        found.setdefault(key, []).append(value)
    for key in sorted(held.keys() | found.keys()):
        ours, theirs = held.get(key, []), found.get(key, [])
        if sorted(digest(key, v) for v in ours) != sorted(digest(key, v) for v in theirs):
            if len(theirs) > 1:
                twice = ("twice: " + ", ".join(map(_shown, theirs)), 0)
                return Difference(tenant, hour_us, store, key, ours[0] if ours else None, twice)
            return Difference(tenant, hour_us, store, key, ours[0] if ours else None, theirs[0] if theirs else None)
    return None


class Primary:
    """PostgreSQL, the store that the others are compared with."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    def tenants(self, name: str | None) -> dict[int, str]:
        """The tenants, or the one named, by id.

        Raises:
            StorageError: PostgreSQL does not answer.
        """
        with translated(), psycopg.connect(self._dsn) as connection:
            return dict(connection.execute(_SQL["tenants"], {"name": name}).fetchall())

    def now_us(self) -> int:
        """The primary's clock."""
        with translated(), psycopg.connect(self._dsn) as connection:
            row = connection.execute(_SQL["now"]).fetchone()
        return int(row[0]) if row else 0

    def floor_us(self, tenant_id: int) -> int:
        """The reading time from which on a tenant's history is whole."""
        with translated(), psycopg.connect(self._dsn) as connection:
            row = connection.execute(_SQL["floor"], {"tenant": tenant_id}).fetchone()
        return int(row[0]) if row else 0

    def remains(self, tenant: str | None) -> list[tuple[str, int, str, str, int]]:
        """What is left here of deleted devices: tenant, id, former name, table, rows. `tenant`: one by name, or all."""
        with translated(), psycopg.connect(self._dsn) as connection:
            return connection.execute(_SQL["remains"], {"name": tenant}).fetchall()

    def deleted(self, tenant_id: int) -> dict[int, str]:
        """The devices whose deletion has ended lately, id and former name."""
        with translated(), psycopg.connect(self._dsn) as connection:
            return dict(connection.execute(_SQL["deletions"], {"tenant": tenant_id, "ended": True}).fetchall())

    def names(self, tenant_id: int) -> tuple[dict[int, str], set[int]]:
        """The devices of a tenant, id and name; and the ids of those whose deletion is under way, which have none."""
        with translated(), psycopg.connect(self._dsn) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            there: dict[int, str] = dict(connection.execute(_SQL["names"], {"tenant": tenant_id}).fetchall())
            leaving = connection.execute(_SQL["deletions"], {"tenant": tenant_id, "ended": False}).fetchall()
            return there, {row[0] for row in leaving}

    def readings(self, tenant_id: int, from_us: int, to_us: int) -> Iterator[tuple[Key, Held]]:
        """See `Store.readings`; all types as of one moment."""
        with translated(), psycopg.connect(self._dsn) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            for value_type in ValueType:
                # A server-side cursor: an hour of a large tenant does not fit in memory.
                with connection.cursor("readings") as cursor:
                    cursor.itersize = 10_000
                    bounds = {"tenant": tenant_id, "from": moment(from_us), "to": moment(to_us)}
                    cursor.execute(_of_type("readings", value_type), bounds)
                    for entity_id, attribute_id, time_us, value, revision in cursor:
                        yield (value_type, entity_id, attribute_id, time_us), (value, revision)


class WarehouseStore:
    """The warehouse as a store to compare."""

    name = "warehouse"

    def __init__(self, warehouse: Warehouse, *, pause_s: float = 0.25) -> None:
        self._warehouse = warehouse
        self._pause_s = pause_s

    def wait_for(self, through_us: int, deadline: float) -> None:
        """See `Store.wait_for`."""
        while True:
            done = self._warehouse.completeness(Scope())
            if done.as_of_us is not None and done.as_of_us >= through_us:
                return
            if time.monotonic() > deadline:
                through = "nothing" if done.as_of_us is None else moment(done.as_of_us).isoformat()
                halted = f"; halted: {'; '.join(done.halted)}" if done.halted else ""
                raise VerifyTimeout(f"the warehouse is complete through {through} only{halted}: is the loader running?")
            time.sleep(self._pause_s)

    def readings(self, tenant_id: int, from_us: int, to_us: int) -> Iterator[tuple[Key, Held]]:
        """See `Store.readings`."""
        scope = Scope(tenant_id, from_us, to_us)
        for value_type in ValueType:
            answer = self._warehouse.query(
                # Also of devices that are being deleted: both stores still have readings of them.
                f"SELECT entity_id, attribute_id, ts, value, revision FROM {resolved_relation(value_type)} "
                "WHERE tenant_id = %s AND ts >= %s AND ts < %s",
                [tenant_id, naive(from_us), naive(to_us)],
                scope=scope,
            )
            for entity_id, attribute_id, ts, value, revision in answer.rows:
                yield (value_type, entity_id, attribute_id, naive_microseconds(ts)), (value, revision)

    def complete_from_us(self, tenant_id: int) -> int | None:
        """See `Store.complete_from_us`."""
        return self._warehouse.completeness(Scope(tenant_id)).complete_from_us

    def names(self, tenant_id: int) -> Mapping[int, str]:
        """See `Store.names`."""
        statement = "SELECT entity_id, external_id FROM entities WHERE tenant_id = %s"
        return {row[0]: row[1] for row in self._warehouse.query(statement, [tenant_id], scope=Scope(tenant_id)).rows}

    def remains(self, tenant_id: int, entity_ids: Sequence[int]) -> Iterator[tuple[int, str]]:
        """See `Store.remains`. Names are compared with PostgreSQL's anyway."""
        for start in range(0, len(entity_ids), _IDS_PER_QUESTION):
            some = entity_ids[start : start + _IDS_PER_QUESTION]
            found = []
            for value_type in ValueType:
                answer = self._warehouse.query(
                    f"SELECT entity_id, count(*) FROM {resolved_relation(value_type)} "
                    f"WHERE tenant_id = %s AND entity_id IN ({', '.join(['%s'] * len(some))}) GROUP BY entity_id",
                    [tenant_id, *some],
                    scope=Scope(tenant_id),
                )
                found += [(entity_id, f"{count} readings ({value_type})") for entity_id, count in answer.rows]
            yield from sorted(found)

    def gone(self, tenant_id: int) -> set[int]:
        """The devices that the warehouse holds as deleted: whatever it has of them, it shows to nobody."""
        statement = f"SELECT entity_id FROM {GONE} WHERE tenant_id = %s"
        return {row[0] for row in self._warehouse.query(statement, [tenant_id], scope=Scope(tenant_id)).rows}


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What an audit found. `differences` has the first reading of each hour that differs."""

    hours: int
    readings: int
    differences: tuple[Difference, ...]


def verify(
    primary: Primary,
    store: Store,
    *,
    tenant: str | None = None,
    from_us: int | None = None,
    to_us: int | None = None,
    patience_s: float = 120.0,
    tries: int = 3,
    report: Callable[[HourAudit], None] = lambda _: None,
) -> VerifyResult:
    """Compare a store with PostgreSQL, hour by hour.

    Args:
        tenant: one tenant by name; None for all.
        from_us: first timestamp to compare, where history is whole; None for where that begins.
        to_us: end of the range; None for no end.
        patience_s: how long, in seconds, the store may take to become complete each time.
        tries: how often an hour that differs is looked at before it counts: readings may arrive meanwhile.
        report: told of each hour once it is decided.

    Raises:
        VerifyTimeout: the store did not become complete in time.
        StorageError: a store does not answer.
    """
    store.wait_for(primary.now_us(), time.monotonic() + patience_s)
    hours = readings = 0
    differences: list[Difference] = []
    for tenant_id, name in primary.tenants(tenant).items():
        whole = max(primary.floor_us(tenant_id), store.complete_from_us(tenant_id) or -_LAST_US)
        # An hour that is whole in part only is left out, as one that a caller's range begins within is taken in.
        whole += -whole % HOUR_US
        low = whole if from_us is None else max(whole, from_us - from_us % HOUR_US)
        high = _LAST_US if to_us is None else to_us
        ours = fingerprints(primary.readings(tenant_id, low, high))
        theirs = fingerprints(store.readings(tenant_id, low, high))
        for hour in sorted(ours.keys() | theirs.keys()):
            audit = HourAudit(name, hour, ours.get(hour, Fingerprint()), theirs.get(hour, Fingerprint()))
            found = None
            for _ in range(tries):
                if audit.equal:
                    break
                audit, found = _look_again(primary, store, tenant_id, audit, patience_s)
            hours += 1
            readings += audit.primary.readings
            if found is not None and not audit.equal:
                differences.append(found)
            report(audit)
    return VerifyResult(hours, readings, tuple(differences))


def _look_again(
    primary: Primary, store: Store, tenant_id: int, audit: HourAudit, patience_s: float
) -> tuple[HourAudit, Difference | None]:
    end = audit.hour_us + HOUR_US
    ours = list(primary.readings(tenant_id, audit.hour_us, end))
    store.wait_for(primary.now_us(), time.monotonic() + patience_s)
    theirs = list(store.readings(tenant_id, audit.hour_us, end))
    again = HourAudit(
        audit.tenant,
        audit.hour_us,
        fingerprints(ours).get(audit.hour_us, Fingerprint()),
        fingerprints(theirs).get(audit.hour_us, Fingerprint()),
    )
    return again, first_difference(audit.tenant, audit.hour_us, store.name, ours, theirs)


def _of_type(name: str, value_type: ValueType) -> LiteralString:
    return _SQL[name].replace("{type}", value_type)


def _shown(held: Held | None) -> str:
    return "nothing" if held is None else f"{held[0]!r} (revision {held[1]})" if held[1] else repr(held[0])


def by_tenant(audits: Iterable[HourAudit]) -> Mapping[str, tuple[Fingerprint, Fingerprint]]:
    """The sums of all hours of each tenant, in PostgreSQL and in the other store."""
    sums: dict[str, tuple[Fingerprint, Fingerprint]] = {}
    for audit in audits:
        one, other = sums.get(audit.tenant, (Fingerprint(), Fingerprint()))
        sums[audit.tenant] = (one + audit.primary, other + audit.other)
    return sums
