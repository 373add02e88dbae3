-- Devices by conditions. Every statement runs in a read session (see reads.sql).

-- name: materialization_watermark
-- Rollups and projections hold everything committed before this; NULL: that is not known. In the same snapshot as
-- the data it vouches for, also on a replica.
SELECT CASE WHEN count(c.published_through) = (SELECT lanes FROM settings) THEN min(c.published_through) END,
       pg_is_in_recovery()
  FROM outbox_consumers c
 WHERE c.consumer = 'rollup'

-- name: serving_projections
-- With the watermark, as in materialization_watermark. A table may be gone that the snapshot still shows in use: on a replica
-- that catches up, long before the time that the worker leaves to reads.
SELECT p.projection_id, p.name, p.entity_type, p.attribute_ids, w.through, pg_is_in_recovery()
  FROM projections p
 CROSS JOIN (
       SELECT CASE WHEN count(c.published_through) = (SELECT lanes FROM settings) THEN min(c.published_through) END
         FROM outbox_consumers c
        WHERE c.consumer = 'rollup') w (through)
 WHERE p.tenant_id = %(tenant)s AND p.state = 'serving' AND w.through IS NOT NULL
   AND to_regclass('tenant_data.projection_' || p.projection_id) IS NOT NULL

-- name: plan_by_latest
-- Plans for the very constants. Where latest values are looked at device by device, nothing but their key may serve:
-- a hash over the latest values of all attributes costs more than any page.
SELECT set_config('plan_cache_mode', 'force_custom_plan', true),
       set_config('enable_hashjoin', 'off', true),
       set_config('enable_mergejoin', 'off', true)

-- name: plan_by_projection
-- Plans for the very constants. A page can be filled by walking along the names until enough devices were met, or by
-- sorting what the indexes of the values find. A walk goes to another page of the table for every device, again and
-- again; with a large cache the planner takes all but the first visit for free, and walks through half the fleet for
-- a hundred devices that the other indexes find at once.
-- And the devices that are being deleted: they have no name any more, and may still have a row.
SELECT set_config('plan_cache_mode', 'force_custom_plan', true),
       set_config('effective_cache_size', '1MB', true),
       ARRAY(SELECT entity_id FROM entity_deletions WHERE tenant_id = %(tenant)s AND ended_at IS NULL)

-- name: find_by_latest
-- Devices in the order of their names, each with the latest values that the conditions name.
SELECT e.entity_id, e.external_id, e.entity_type, e.labels, e.created_at
  FROM entities e
  {values}
 WHERE e.tenant_id = %(tenant)s
   AND e.external_id > %(after)s
   AND (%(only)s::text IS NULL OR e.external_id = %(only)s::text)
   AND {condition}
 ORDER BY e.external_id
 LIMIT %(limit)s

-- name: latest_value
LEFT JOIN LATERAL (
    SELECT l.{column} AS value FROM latest_values l
     WHERE l.tenant_id = %(tenant)s AND l.entity_id = e.entity_id AND l.attribute_id = {attribute}
       AND l.ts >= %(oldest)s) {alias} ON true

-- name: find_by_projection
-- The same from one table, by its indexes.
SELECT p.entity_id, p.external_id, p.entity_type, p.labels, p.created_at{values}
  FROM {projection} p
 WHERE p.tenant_id = %(tenant)s
   AND p.external_id > %(after)s
   AND (%(only)s::text IS NULL OR p.external_id = %(only)s::text)
   AND {condition}
 ORDER BY p.external_id
 LIMIT %(limit)s
