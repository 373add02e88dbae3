-- Readings summed up. Every statement runs in a read session (see reads.sql); {…} are filled in by
-- storage/aggregate/database.py.

-- name: plan_aggregate
-- Plans for the very range, which leave out the partitions beyond it.
SELECT set_config('plan_cache_mode', 'force_custom_plan', true)

-- name: serving_rollups
-- The time from which each attribute's buckets are filled; of one that is filled to the end, none is stored.
SELECT a.attribute_id, min(coalesce(r.complete_from, '1900-01-01 00:00+00'))
  FROM rollups r CROSS JOIN LATERAL unnest(r.attribute_ids) a (attribute_id)
 WHERE r.tenant_id = %(tenant)s AND (r.state = 'serving' OR (r.state = 'backfilling' AND r.complete_from IS NOT NULL))
   AND a.attribute_id = ANY (%(attributes)s)
 GROUP BY a.attribute_id

-- name: devices_of_filter
SELECT e.entity_id, e.external_id
  FROM entities e
  {values}
 WHERE e.tenant_id = %(tenant)s
   AND (%(type)s::text = '' OR e.entity_type = %(type)s::text)
   AND (%(labels)s::jsonb = '{{}}' OR e.labels @> %(labels)s::jsonb)
   AND {condition}
 LIMIT %(limit)s

-- name: devices_being_deleted
SELECT entity_id FROM entity_deletions WHERE tenant_id = %(tenant)s AND ended_at IS NULL

-- name: device_names
SELECT entity_id, external_id FROM entities WHERE tenant_id = %(tenant)s AND entity_id = ANY (%(entities)s)

-- name: selected_by_id
SELECT unnest(%(entities)s) AS entity_id

-- name: selected_by_kind
-- Joined to, even if it is every device: what a deletion has not reached yet belongs to no device.
SELECT entity_id FROM entities
 WHERE tenant_id = %(tenant)s
   AND (%(type)s::text = '' OR entity_type = %(type)s::text)
   AND (%(labels)s::jsonb = '{{}}' OR labels @> %(labels)s::jsonb)

-- name: readings_branch
SELECT h.entity_id, h.attribute_id, h.ts, h.value{cast} AS value
  FROM ({selected}) s
  JOIN {table} h ON h.entity_id = s.entity_id
 WHERE h.tenant_id = %(tenant)s AND h.attribute_id = ANY (%(attributes)s) AND h.ts >= {from_} AND h.ts < {to}

-- name: aggregate_readings
SELECT {keys}, {results}
  FROM ({source}) r
 GROUP BY {keys_by_number}
 LIMIT %(limit)s

-- name: rollup_branch
SELECT h.entity_id, h.attribute_id, h.bucket AS ts, h.readings, h.minimum{cast} AS minimum, h.maximum{cast} AS maximum,
       h.total::double precision AS total, h.deviation, h.first_ts, h.first_value{cast} AS first_value, h.last_ts,
       h.last_value{cast} AS last_value
  FROM ({selected}) s
  JOIN {table} h ON h.entity_id = s.entity_id
 WHERE h.tenant_id = %(tenant)s AND h.attribute_id = ANY (%(attributes)s) AND h.bucket >= {from_} AND h.bucket < {to}

-- name: reading_as_rollup
-- A reading at the ragged end of a range, as a bucket of one.
SELECT entity_id, attribute_id, ts, 1::bigint, value, value,
       CASE WHEN {huge} THEN 'NaN'::double precision ELSE value END,
       CASE WHEN {tame} THEN 0 ELSE 'NaN'::double precision END, ts, value, ts, value
  FROM ({source}) r

-- name: merge_rollups
-- Buckets merge exactly: the deviations from each bucket's own mean, and those of the means from the overall one.
SELECT {keys}, {results}
  FROM (SELECT p.*, {mean} AS mean{overall} FROM ({source}) p {window}) r
 GROUP BY {keys_by_number}
 LIMIT %(limit)s

-- name: within_text
-- As many rows of an answer as texts are wanted of, and the one that passes that: the rest would only fill memory.
SELECT {columns}
  FROM (SELECT a.*, sum({bytes}) OVER (ROWS UNBOUNDED PRECEDING) - ({bytes}) AS bytes_before
          FROM ({answer}) a ({columns})) b
 WHERE bytes_before <= {most}
