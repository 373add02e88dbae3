-- Statements of storage/deletion.py: the work of a deletion, one bounded step at a time.

-- name: ordered_deletion
-- As due_deletion: the one that this transaction has ordered.
SELECT d.operation_id, d.tenant_id, t.name, d.entity_id, d.external_id, d.step, (SELECT buckets FROM settings),
       (SELECT lanes FROM settings)
  FROM entity_deletions d JOIN tenants t USING (tenant_id)
 WHERE d.operation_id = %(operation)s

-- name: due_deletion
-- The oldest deletion that has something to do now.
SELECT d.operation_id, d.tenant_id, t.name, d.entity_id, d.external_id, d.step, (SELECT buckets FROM settings),
       (SELECT lanes FROM settings)
  FROM entity_deletions d JOIN tenants t USING (tenant_id)
 WHERE d.ended_at IS NULL
   AND CASE d.step
       WHEN 'settle' THEN d.deleted_at + %(settle)s < clock_timestamp()
       -- The warehouse has it once the entity's lane is loaded past the deletion; where there is none, nobody waits.
       WHEN 'warehouse' THEN NOT EXISTS (
           SELECT FROM loaded_lanes l CROSS JOIN settings s
            WHERE l.lane = (d.entity_id %% s.buckets) %% s.lanes AND l.loaded_through <= d.deleted_at)
       ELSE true END
 ORDER BY d.problem <> '', d.created_at, d.operation_id
 LIMIT 1 FOR UPDATE OF d

-- name: delete_readings
-- By key, for the keys of partitions differ in nothing else. FOR UPDATE: a write under way is waited for.
DELETE FROM entity_attributes_{type} h
 USING (SELECT attribute_id, ts FROM entity_attributes_{type}
         WHERE tenant_id = %(tenant)s AND entity_id = %(entity)s LIMIT %(limit)s FOR UPDATE) d
 WHERE h.tenant_id = %(tenant)s AND h.entity_id = %(entity)s AND h.attribute_id = d.attribute_id AND h.ts = d.ts
RETURNING h.attribute_id, (extract(epoch FROM h.ts) * 1000000)::bigint, coalesce(h.revision, 0)

-- name: attributes
SELECT attribute_id, name FROM attributes WHERE tenant_id = %(tenant)s AND attribute_id = ANY (%(attributes)s::integer[])

-- name: ensure_outbox
SELECT ensure_outbox(now(), now() + interval '3 hours')

-- name: append_outbox
-- So that everybody who follows the changes forgets the readings too, and the device.
INSERT INTO outbox (lane, batch_id, changes, tenant_ids, min_ts, max_ts, payload)
VALUES (%(lane)s, %(batch)s, %(changes)s, %(tenants)s::integer[], %(min_ts)s::timestamptz[],
        %(max_ts)s::timestamptz[], %(payload)b)

-- name: delete_rest
-- What belongs to the device besides readings; few rows each, save the latest values, which the attributes bound.
WITH latest AS (DELETE FROM latest_values WHERE tenant_id = %(tenant)s AND entity_id = %(entity)s),
     streams AS (DELETE FROM device_streams WHERE tenant_id = %(tenant)s AND entity_id = %(entity)s),
     sessions AS (DELETE FROM device_sessions WHERE tenant_id = %(tenant)s AND entity_id = %(entity)s),
     rejections AS (DELETE FROM stream_rejections WHERE tenant_id = %(tenant)s AND entity_id = %(entity)s)
DELETE FROM quarantine WHERE tenant_id = %(tenant)s AND entity_id = %(entity)s

-- name: delete_buckets
DELETE FROM {table} r
 USING (SELECT attribute_id, bucket FROM {table}
         WHERE tenant_id = %(tenant)s AND entity_id = %(entity)s LIMIT %(limit)s FOR UPDATE) d
 WHERE r.tenant_id = %(tenant)s AND r.entity_id = %(entity)s AND r.attribute_id = d.attribute_id AND r.bucket = d.bucket

-- name: projections_of_tenant
SELECT projection_id FROM projections WHERE tenant_id = %(tenant)s

-- name: delete_projected
DELETE FROM {table} WHERE tenant_id = %(tenant)s AND entity_id = %(entity)s

-- name: move_deletion
-- deleted_at is read again when it is the warehouse's turn: only then have the transactions of all records committed,
-- and a lane loaded past it has them.
UPDATE entity_deletions
   SET step = %(step)s, readings_deleted = readings_deleted + %(readings)s, problem = '',
       started_at = coalesce(started_at, now()),
       deleted_at = CASE WHEN %(readings)s > 0 OR %(step)s IN ('settle', 'warehouse') THEN clock_timestamp() ELSE deleted_at END,
       ended_at = CASE WHEN %(step)s = 'done' THEN clock_timestamp() END
 WHERE operation_id = %(operation)s

-- name: note_problem
UPDATE entity_deletions SET problem = %(problem)s WHERE operation_id = %(operation)s

-- name: forget_deletions
DELETE FROM entity_deletions WHERE ended_at < now() - interval '30 days'

-- name: order_deletion
SELECT delete_entity(%(tenant)s, %(name)s, %(operation)s)

-- name: operations
-- Newest first, from behind a position on.
SELECT operation_id, external_id, step, readings_deleted, problem, created_at, started_at, ended_at
  FROM entity_deletions
 WHERE tenant_id = %(tenant)s
   AND (%(operation)s::uuid IS NULL OR operation_id = %(operation)s::uuid)
   AND (%(after_id)s::uuid IS NULL OR (created_at, operation_id) < (%(after_at)s, %(after_id)s::uuid))
 ORDER BY created_at DESC, operation_id DESC
 LIMIT %(limit)s
