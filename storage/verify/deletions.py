"""The audit of deletions: is everything of a deleted device gone, from everywhere?

PostgreSQL remembers a deletion for 30 days after its end. Of these devices nothing may be left in its own tables, and
no reading in another store. Besides, a store that keeps names may name no device that PostgreSQL does not have,
however long ago it was deleted; a deletion under way explains one.

And the other way around: a device that PostgreSQL has must not be one that the warehouse holds as deleted, for it shows
nothing of such a device, while both have the same readings. That is so after a restore of PostgreSQL to a moment before
the deletion, or a failover that lost it.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from storage.verify.readings import Primary, Store, WarehouseStore

Deleted: TypeAlias = Mapping[tuple[int, str], Mapping[int, str]]
"""Of each tenant, by id and name, the devices that were deleted: id and former name."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something of a device that should not be there. `device`: the name it had, or is called where it was found."""

    tenant: str
    entity_id: int
    device: str
    store: str
    found: str

    def __str__(self) -> str:
        return (
            f"tenant {self.tenant}, deleted device {self.device!r} (id {self.entity_id}): {self.store} has {self.found}"
        )


@dataclass(frozen=True, slots=True)
class Hidden:
    """A device that PostgreSQL has, and a store holds as deleted."""

    tenant: str
    entity_id: int
    device: str
    store: str

    def __str__(self) -> str:
        return (
            f"tenant {self.tenant}, device {self.device!r} (id {self.entity_id}): PostgreSQL has it, and {self.store} "
            "holds it as deleted and shows nothing of it: run `atlasco rebuild` (see docs/operations.md, Restore to a "
            "point in time)"
        )


def hidden_devices(primary: Primary, store: WarehouseStore, tenants: Iterable[tuple[int, str]]) -> list[Hidden]:
    """The devices that are there and that the warehouse hides, of tenants given by id and name.

    Raises:
        StorageError: a store does not answer.
    """
    found = []
    for tenant_id, tenant in tenants:
        # The warehouse first: what it knows of a deletion was committed in PostgreSQL before, so no deletion that is
        # ordered meanwhile can look like a difference, and nothing need be looked at twice.
        gone = store.gone(tenant_id)
        if gone:
            there, leaving = primary.names(tenant_id)
            hidden = sorted((gone & there.keys()) - leaving)
            found += [Hidden(tenant, entity_id, there[entity_id], f"the {store.name}") for entity_id in hidden]
    return found


def leftovers_in_primary(primary: Primary, tenant: str | None = None) -> list[Leftover]:
    """What PostgreSQL has of devices whose deletion has ended, of one tenant by name or of all.

    Raises:
        StorageError: PostgreSQL does not answer.
    """
    return [
        Leftover(name, entity_id, device, "PostgreSQL", f"{rows} rows in {table}")
        for name, entity_id, device, table, rows in primary.remains(tenant)
    ]


def deleted_devices(primary: Primary, tenant: str | None = None) -> Deleted:
    """The devices whose deletion has ended by now, of one tenant by name or of all.

    Raises:
        StorageError: PostgreSQL does not answer.
    """
    return {(tenant_id, name): primary.deleted(tenant_id) for tenant_id, name in primary.tenants(tenant).items()}


def leftovers_in_store(
    primary: Primary, store: Store, deleted: Deleted, *, patience_s: float = 120.0, tries: int = 3
) -> list[Leftover]:
    """What another store has of devices that PostgreSQL no longer has, for the tenants in `deleted`.

    Args:
        primary: PostgreSQL.
        store: the other store, which must have become complete through a moment after `deleted` was read.
        deleted: the devices of which nothing may be left.
        patience_s: how long, in seconds, the store may take to become complete each time.
        tries: how often a name that should not be there is looked for: its device may be deleted meanwhile.

    Raises:
        VerifyTimeout: the store did not become complete in time.
        StorageError: a store does not answer.
    """
    found = []
    for (tenant_id, name), former in deleted.items():
        for entity_id, what in store.remains(tenant_id, list(former)) if former else ():
            found.append(Leftover(name, entity_id, former[entity_id], f"the {store.name}", what))
        found += _names(primary, store, tenant_id, name, patience_s, tries)
    return found


def _names(
    primary: Primary, store: Store, tenant_id: int, tenant: str, patience_s: float, tries: int
) -> list[Leftover]:
    ours: dict[int, str] = {}
    wrong: dict[int, str] = {}
    for attempt in range(tries):
        if attempt:
            store.wait_for(primary.now_us(), time.monotonic() + patience_s)
        # The store first: a device that is registered in between is in PostgreSQL then.
        theirs = store.names(tenant_id)
        if not theirs:
            return []
        ours, leaving = primary.names(tenant_id)
        wrong = {e: name for e, name in theirs.items() if e not in leaving and ours.get(e) != name}
        if not wrong:
            break
    return [
        Leftover(
            tenant,
            entity_id,
            name,
            f"the {store.name}",
            "its name" if entity_id not in ours else f"this name, and PostgreSQL calls it {ours[entity_id]!r}",
        )
        for entity_id, name in sorted(wrong.items())
    ]
