"""Upkeep of a Redshift warehouse: fold corrections, expire, tidy the staging bucket.

Under the load lock, for a fold deletes and inserts what a load could be appending to. Redshift sorts and reclaims space
by itself (automatic vacuum).
"""

from storage.model import ValueType
from storage.times import naive
from storage.warehouse.columns import base_kind, delta_kind
from storage.warehouse.port import Upkeep
from storage.warehouse.redshift_session import RedshiftSessions
from storage.warehouse.redshift_state import SQL, execute, put_complete_from, rows
from storage.warehouse.staging import Staging


def compact(sessions: RedshiftSessions, staging: Staging, batches_before_us: int) -> Upkeep:
    """See `port.Warehouse.compact`."""
    folded = 0
    for value_type in ValueType:
        with sessions.transaction() as cursor:
            execute(cursor, SQL["lock"])
            before = rows(cursor, SQL["size"].format(kind=delta_kind(value_type)))[0][0]
            if not before:
                continue
            execute(cursor, SQL["best_of_delta"].format(type=value_type))
            for step in ("fold_away", "fold_in", "fold_out"):
                execute(cursor, SQL[step].format(type=value_type))
            execute(cursor, SQL["drop_folded"])
            folded += before - rows(cursor, SQL["size"].format(kind=delta_kind(value_type)))[0][0]
    with sessions.transaction() as cursor:
        execute(cursor, SQL["lock"])
        execute(cursor, SQL["forget_batches"], [batches_before_us])
    return Upkeep(corrections_folded=folded, files_deleted=staging.collect())


def expire(sessions: RedshiftSessions, before_us: int, tenant_id: int | None) -> Upkeep:
    """See `port.Warehouse.expire`."""
    expired = 0
    with sessions.transaction() as cursor:
        execute(cursor, SQL["lock"])
        for value_type in ValueType:
            for kind in (base_kind(value_type), delta_kind(value_type)):
                if tenant_id is None:
                    execute(cursor, SQL["expire"].format(kind=kind), [naive(before_us)])
                else:
                    execute(cursor, SQL["expire_tenant"].format(kind=kind), [naive(before_us), tenant_id])
                expired += max(cursor.rowcount, 0)
        put_complete_from(cursor, tenant_id or 0, before_us)
    return Upkeep(rows_expired=expired)
