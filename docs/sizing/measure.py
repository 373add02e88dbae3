"""Measure what a reading costs to keep: bytes in PostgreSQL, in Kafka and in the warehouse of a running deployment.

    python docs/sizing/measure.py DSN [KAFKA_LOG_DIRECTORY]

DSN is the database as its owner. The directory holds the topic's segments as a broker has them; leave it out where
there is no broker to look at. Prints one JSON object: bytes for each reading. Run `atlasco warehouse compact` first,
or the files of a local warehouse are the small ones that were just loaded. The figures in model.py came from here.
"""

import json
import sys
from pathlib import Path

import psycopg

TYPES = ("double", "bigint", "boolean", "text")

# Leaves whose rows are counted exactly; empty ones would add their first index page.
HISTORY = """
    SELECT i.inhrelid::regclass::text AS leaf
      FROM pg_partition_tree('entity_attributes_{kind}') t JOIN pg_inherits i ON i.inhrelid = t.relid
     WHERE t.isleaf AND pg_relation_size(t.relid) > 1000000
"""


def bytes_per_reading(connection: psycopg.Connection[tuple[int, ...]], kind: str) -> dict[str, float]:
    """Heap, index and rows of one type's history."""
    leaves = [str(row[0]) for row in connection.execute(HISTORY.format(kind=kind)).fetchall()]
    heap = index = rows = 0
    for leaf in leaves:
        found = connection.execute(
            f"SELECT pg_table_size('{leaf}'), pg_indexes_size('{leaf}'), count(*) FROM {leaf}"
        ).fetchone()
        assert found is not None
        heap, index, rows = heap + found[0], index + found[1], rows + found[2]
    return {"readings": rows, "heap": round(heap / max(rows, 1), 1), "index": round(index / max(rows, 1), 1)}


def measure(dsn: str, segments: Path | None) -> dict[str, object]:
    """All of it."""
    found: dict[str, object] = {}
    with psycopg.connect(dsn) as connection:
        for kind in TYPES:
            found[f"history_{kind}"] = bytes_per_reading(connection, kind)
        latest = connection.execute(
            "SELECT sum(pg_total_relation_size(relid)) / nullif((SELECT count(*) FROM latest_values), 0)"
            "  FROM pg_partition_tree('latest_values') WHERE isleaf"
        ).fetchone()
        outbox = connection.execute(
            "SELECT (SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('outbox') WHERE isleaf)"
            "       / nullif(sum(changes), 0), sum(changes), count(*) FROM outbox"
        ).fetchone()
        assert latest is not None and outbox is not None
        found["latest_value"] = round(float(latest[0] or 0), 1)
        found["outbox"] = round(float(outbox[0] or 0), 1)
        found["outbox_readings"] = int(outbox[1] or 0)
        for kind in TYPES:
            files = connection.execute(
                "SELECT coalesce(sum(bytes)::float / nullif(sum(rows), 0), 0), coalesce(sum(rows), 0)"
                "  FROM warehouse.files WHERE kind = %s AND removed_at IS NULL AND rows > 10000",
                [f"base_{kind}"],
            ).fetchone()
            assert files is not None
            found[f"parquet_{kind}"] = {"readings": int(files[1]), "bytes": round(float(files[0]), 2)}
        if segments is not None:
            size = sum(file.stat().st_size for file in segments.glob("atlasco.changes.v1-*/*.log"))
            changes = int(outbox[1] or 1)
            # Comparable only while the outbox still holds all that was ever published.
            found["kafka_one_replica"] = round(size / changes, 1)
    return found


if __name__ == "__main__":
    directory = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    json.dump(measure(sys.argv[1], directory), sys.stdout, indent=2)
    sys.stdout.write("\n")
