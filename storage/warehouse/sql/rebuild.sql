-- What the loader and a rebuild ask of the operational database. Parameters are psycopg's.

-- name: report_loaded_lane
-- Monotonic: two loaders report in any order.
INSERT INTO loaded_lanes AS l (lane, loaded_through)
VALUES (%(lane)s, timestamptz 'epoch' + %(through_us)s * interval '1 microsecond')
ON CONFLICT (lane) DO UPDATE SET loaded_through = excluded.loaded_through, updated_at = now()
 WHERE excluded.loaded_through > l.loaded_through

-- name: clock
SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint

-- name: is_standby
SELECT pg_is_in_recovery()

-- name: snapshot
SELECT pg_current_snapshot()::text

-- name: lanes
SELECT lanes FROM settings

-- name: floors
-- From here on the history is whole. What the warehouse has of before may be the only copy: a retention that was raised
-- reaches back further than what is still here.
SELECT t.tenant_id,
       (extract(epoch FROM greatest(now() - t.retention, t.kept_from)) * 1000000)::bigint
  FROM tenants t ORDER BY t.tenant_id

-- name: ranges
-- The pieces in which a tenant's history is read: the time ranges that exist for it.
SELECT h.ts_from, h.ts_to FROM history_partitions h
 WHERE h.retired_at IS NULL AND %(tenant_id)s >= h.tenant_from AND %(tenant_id)s < h.tenant_to
   AND h.ts_to > timestamptz 'epoch' + %(floor_us)s * interval '1 microsecond'
 ORDER BY h.ts_from

-- name: gone_entities
-- Deletions of the last weeks. Batches of these devices may still stand in the log, or be published again.
COPY (SELECT tenant_id, entity_id FROM entity_deletions ORDER BY 1, 2) TO STDOUT (FORMAT csv)

-- name: entities
COPY (SELECT tenant_id, entity_id, external_id FROM entities ORDER BY 1, 2) TO STDOUT (FORMAT csv)

-- name: attributes
COPY (SELECT tenant_id, attribute_id, name, type FROM attributes ORDER BY 1, 2) TO STDOUT (FORMAT csv)

-- name: tenants
COPY (SELECT tenant_id, name FROM tenants ORDER BY 1) TO STDOUT (FORMAT csv)

-- name: readings
-- Filled in by psycopg on the client, for COPY takes no parameters: table, tenant, range, floor.
COPY (SELECT tenant_id, entity_id, attribute_id, (extract(epoch FROM ts) * 1000000)::bigint, value,
             coalesce(revision, 0)
        FROM {}
       WHERE tenant_id = {} AND ts >= {} AND ts < {}
         AND ts >= timestamptz 'epoch' + {} * interval '1 microsecond') TO STDOUT (FORMAT csv)
