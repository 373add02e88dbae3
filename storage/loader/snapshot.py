"""Was a transaction in a snapshot? PostgreSQL's rule, applied to its text form of pg_snapshot."""

from functools import lru_cache


@lru_cache(maxsize=8)
def _parsed(snapshot: str) -> tuple[int, int, frozenset[int]]:
    lower, upper, running = snapshot.split(":")
    return int(lower), int(upper), frozenset(int(xid) for xid in running.split(",") if xid)


def visible(xid: int, snapshot: str) -> bool:
    """Whether a committed transaction is visible in `snapshot`, such as "95:100:95,97".

    Everything below the first number had ended; everything from the second on had not begun; of those between, the
    ones listed were still running. A transaction that was rolled back left no record to ask about.

    Raises:
        ValueError: the text is not a snapshot.
    """
    lower, upper, running = _parsed(snapshot)
    return xid < lower or (xid < upper and xid not in running)
