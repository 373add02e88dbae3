-- Statements of storage/rollup/declare.py: what tenants declare, and where it stands.

-- name: create_rollup
SELECT create_rollup(%(tenant)s, %(name)s, %(attributes)s, %(backfill_from)s)

-- name: create_projection
SELECT create_projection(%(tenant)s, %(name)s, %(type)s, %(attributes)s)

-- name: drop_rollup
SELECT drop_rollup(%(tenant)s, %(name)s)

-- name: drop_projection
SELECT drop_projection(%(tenant)s, %(name)s)

-- name: attributes
SELECT attribute_id, name, type::text, keeps_latest FROM attributes
 WHERE tenant_id = %(tenant)s AND name = ANY (%(names)s::text[])

-- name: rollups
-- The part done of the span from the newest possible reading back to the oldest that is kept or wanted.
SELECT r.name, (SELECT array_agg(a.name ORDER BY a.name) FROM attributes a
                 WHERE a.tenant_id = r.tenant_id AND a.attribute_id = ANY (r.attribute_ids)),
       r.backfill_from, r.created_at, r.state, r.problem, w.through, r.complete_from,
       CASE WHEN r.state = 'serving' THEN 1 WHEN r.complete_from IS NULL THEN 0
            ELSE least(1, greatest(0, extract(epoch FROM now() + t.window_future - r.complete_from)
                 / greatest(1, extract(epoch FROM now() + t.window_future
                                       - greatest(r.backfill_from, now() - t.retention, t.kept_from))))) END::float8
  FROM rollups r JOIN tenants t USING (tenant_id)
 CROSS JOIN (SELECT min(published_through) AS through FROM outbox_consumers WHERE consumer = 'rollup') w
 WHERE r.tenant_id = %(tenant)s AND (%(name)s::text IS NULL OR r.name = %(name)s)
 ORDER BY r.name

-- name: projections
-- Devices are done in the order of their ids; the rows are the planner's estimate, for counting would read them all.
SELECT p.name, p.entity_type, (SELECT array_agg(a.name ORDER BY a.name) FROM attributes a
                                WHERE a.tenant_id = p.tenant_id AND a.attribute_id = ANY (p.attribute_ids)),
       p.created_at, p.state, p.problem, w.through,
       CASE WHEN p.state = 'serving' THEN 1 WHEN p.backfill_entity = 0 THEN 0
            ELSE (SELECT count(*) FILTER (WHERE e.entity_id <= p.backfill_entity)::float8 / greatest(count(*), 1)
                    FROM entities e WHERE e.tenant_id = p.tenant_id) END::float8,
       (SELECT greatest(c.reltuples, 0)::bigint FROM pg_class c
         WHERE c.relname = 'p' || p.projection_id AND c.relnamespace = 'projections'::regnamespace)
  FROM projections p
 CROSS JOIN (SELECT min(published_through) AS through FROM outbox_consumers WHERE consumer = 'rollup') w
 WHERE p.tenant_id = %(tenant)s AND (%(name)s::text IS NULL OR p.name = %(name)s)
 ORDER BY p.name
