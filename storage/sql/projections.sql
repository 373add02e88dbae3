-- Wide projections: one row per device. {…} are filled in by storage/rollup/projection.py.

-- name: refresh
-- Rows of devices whose values changed, from their latest values; unchanged rows are left alone.
INSERT INTO {table} AS p (tenant_id, entity_id, external_id, entity_type, labels, created_at, {columns})
SELECT e.tenant_id, e.entity_id, e.external_id, e.entity_type, e.labels, e.created_at, {names}
  FROM entities e CROSS JOIN LATERAL (
       SELECT {pivots} FROM latest_values l
        WHERE l.tenant_id = %(tenant)s AND l.entity_id = e.entity_id AND l.attribute_id = ANY (%(attributes)s)) v
 WHERE e.tenant_id = %(tenant)s AND e.entity_id = ANY (%(entities)s)
   AND (%(type)s::text = '' OR e.entity_type = %(type)s::text)
ON CONFLICT (tenant_id, entity_id) DO UPDATE SET ({columns}) = ROW ({excluded})
 WHERE ({current}) IS DISTINCT FROM ({excluded})

-- name: forget
-- Devices that are gone.
DELETE FROM {table} p
 WHERE p.tenant_id = %(tenant)s AND p.entity_id = ANY (%(entities)s)
   AND NOT EXISTS (SELECT FROM entities e WHERE e.tenant_id = %(tenant)s AND e.entity_id = p.entity_id)

-- name: suspend_projection
-- Out of service, until it is filled anew: as suspend_rollups.
UPDATE projections SET state = 'pending', backfill_entity = 0, problem = %(problem)s
 WHERE projection_id = %(projection)s AND state <> 'dropping'
   AND (state, backfill_entity, problem) <> ('pending', 0, %(problem)s)

-- name: pending_projection
SELECT projection_id, backfill_entity FROM projections
 WHERE state IN ('pending', 'backfilling') AND projection_id <> ALL (%(resting)s)
 ORDER BY created_at, projection_id LIMIT 1 FOR UPDATE

-- name: move_projection
UPDATE projections SET state = %(state)s, backfill_entity = %(entity)s, problem = '' WHERE projection_id = %(projection)s

-- name: dropped_projections
-- In use by nothing that begins from now on.
SELECT projection_id FROM projections WHERE state = 'dropping' ORDER BY projection_id

-- name: remove_projection
SELECT remove_projection(%(projection)s)
