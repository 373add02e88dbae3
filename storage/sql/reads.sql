-- What services ask for. Every statement runs on a query connection (search_path = tenant_data, public), in a
-- read-only repeatable-read transaction that begins with enter_tenant.
--
-- The views of tenant_data already show one tenant; each statement names the tenant all the same, because only a
-- constant lets the planner leave out the partitions of other customers.

-- name: enter_tenant
-- Names the tenant whose rows the views show, bounds every statement in the database itself (should the caller die,
-- nobody else would cancel it), and says what the snapshot proves. As of when the answer is: now() is the start of the
-- transaction and so lies before its snapshot; that holds on the primary alone, so a standby has to be told apart. And
-- the oldest time shown: readings before it are past the tenant's retention, or were when that was shorter, whether or
-- not their partition is gone. No JIT, no workers: compiling or forking costs more than any of these reads takes.
SELECT now(),
       -- CASE, because the view of tenants shows nothing until the tenant is named, and CASE keeps that order.
       CASE WHEN set_config('atlasco.tenant_id', %(tenant)s::text, true) <> '' THEN
            (SELECT greatest(now() - t.retention, t.kept_from) FROM tenants t
              WHERE t.tenant_id = %(tenant)s::text::integer)
       END,
       pg_snapshot_xmin(pg_current_snapshot())::text,
       pg_snapshot_xmax(pg_current_snapshot())::text,
       pg_is_in_recovery(),
       set_config('statement_timeout', %(timeout_ms)s::text, true),
       set_config('jit', 'off', true),
       set_config('max_parallel_workers_per_gather', '0', true)

-- name: enter_tenant_on_copy
-- The same on a replica. now() is its own clock and says nothing about how far it has come: what does is the heartbeat
-- in this very snapshot. Another database's heartbeat proves nothing.
SELECT (SELECT beat_at FROM public.heartbeat WHERE database_id = %(database)s),
       -- CASE, because the view of tenants shows nothing until the tenant is named, and CASE keeps that order.
       CASE WHEN set_config('atlasco.tenant_id', %(tenant)s::text, true) <> '' THEN
            (SELECT greatest(now() - t.retention, t.kept_from) FROM tenants t
              WHERE t.tenant_id = %(tenant)s::text::integer)
       END,
       pg_snapshot_xmin(pg_current_snapshot())::text,
       pg_snapshot_xmax(pg_current_snapshot())::text,
       set_config('statement_timeout', %(timeout_ms)s::text, true),
       set_config('jit', 'off', true),
       set_config('max_parallel_workers_per_gather', '0', true)

-- name: seam
-- The reading time below which everything of the tenant in this snapshot is in the warehouse too.
SELECT public.warehouse_seam(%(tenant)s)

-- name: plan_series
-- Plans for the very range (a generic one holds every partition of the tenant), which read in key order and stop at the
-- page's end. A plan that collects the range first and sorts it looks as cheap to a planner that misjudges the range,
-- and costs the whole range for every page.
SELECT set_config('plan_cache_mode', 'force_custom_plan', true),
       set_config('enable_sort', 'off', true),
       set_config('enable_hashagg', 'off', true),
       set_config('enable_bitmapscan', 'off', true),
       set_config('enable_seqscan', 'off', true)

-- name: find_entities
SELECT external_id, entity_id
  FROM entities
 WHERE tenant_id = %(tenant)s AND external_id = ANY (%(names)s::text[])

-- name: find_attributes
SELECT name, attribute_id, type::text, keeps_latest
  FROM attributes
 WHERE tenant_id = %(tenant)s AND name = ANY (%(names)s::text[])

-- name: latest_of_devices
-- Devices by name with their newest values; one row without a value for a device that has none, no row for one that
-- does not exist. By device, for then the execution leaves out the partitions that a device is not in, and the plan for
-- any device is as good as one for this device: it is kept, where planning would cost four times the read. OFFSET keeps
-- it so: a join the other way round would hash the latest values of the whole tenant. The sub-selects hide from the
-- planner how many names there are, or it would plan anew for every call.
SELECT e.external_id, v.name, v.ts, v.double_value, v.bigint_value, v.boolean_value, v.text_value
  FROM entities e
  LEFT JOIN LATERAL (
       SELECT a.name, l.ts, l.double_value, l.bigint_value, l.boolean_value, l.text_value
         FROM latest_values l
         JOIN attributes a ON a.tenant_id = %(tenant)s AND a.attribute_id = l.attribute_id
        WHERE l.tenant_id = %(tenant)s AND l.entity_id = e.entity_id AND {condition}
          AND l.ts >= (SELECT greatest(now() - t.retention, t.kept_from) FROM tenants t WHERE t.tenant_id = %(tenant)s)
       OFFSET 0) v ON true
 WHERE e.tenant_id = %(tenant)s AND e.external_id = ANY ((SELECT %(names)s::text[])::text[])
 LIMIT %(limit)s

-- name: latest_all
-- An attribute that opted out of latest values may have a row from before: it is no longer kept up to date.
a.keeps_latest

-- name: latest_some
l.attribute_id = ANY ((SELECT %(attributes)s)::integer[])

-- name: latest_of_attributes
-- The same for devices that were found already, and some attributes.
SELECT l.entity_id, a.name, l.ts, l.double_value, l.bigint_value, l.boolean_value, l.text_value
  FROM latest_values l
  JOIN attributes a ON a.tenant_id = %(tenant)s AND a.attribute_id = l.attribute_id
 WHERE l.tenant_id = %(tenant)s
   AND l.entity_id = ANY (%(entities)s)
   AND l.attribute_id = ANY (%(attributes)s)
   AND l.ts >= (SELECT greatest(now() - t.retention, t.kept_from) FROM tenants t WHERE t.tenant_id = %(tenant)s)
 LIMIT %(limit)s

-- name: series_branch
-- A part of a page: the next readings of one value type in key order. One branch per type that the request names;
-- the limit in each branch keeps it from sorting or collecting more than a page. The arrays come from sub-selects
-- because the planner weighs a constant array element by element, for every partition.
(SELECT entity_id, attribute_id, ts, {values}, revision
   FROM {table}
  WHERE tenant_id = %(tenant)s
    AND entity_id = ANY ((SELECT %(entities)s)::bigint[])
    AND attribute_id = ANY ((SELECT {attributes})::integer[])
    AND ts >= %(start)s AND ts < %(end)s
  ORDER BY entity_id {direction}, attribute_id {direction}, ts {direction}
  LIMIT %(limit)s)

-- name: series_branch_limited
-- The same with at most so many readings of each series: an index scan of its own for each, that stops by itself.
(SELECT e.entity_id, a.attribute_id, h.ts, {values}, h.revision
   FROM unnest((SELECT %(entities)s)::bigint[]) AS e (entity_id)
  CROSS JOIN unnest((SELECT {attributes})::integer[]) AS a (attribute_id)
  CROSS JOIN LATERAL (
        SELECT ts, value, revision
          FROM {table}
         WHERE tenant_id = %(tenant)s AND entity_id = e.entity_id AND attribute_id = a.attribute_id
           AND ts >= %(start)s AND ts < %(end)s
         ORDER BY ts {direction}
         LIMIT %(limit_per_series)s) h
  ORDER BY entity_id {direction}, attribute_id {direction}, ts {direction}
  LIMIT %(limit)s)

-- name: series_merged
SELECT * FROM ({branches}) b ORDER BY entity_id {direction}, attribute_id {direction}, ts {direction} LIMIT %(limit)s

-- name: series_within_bytes
-- Texts can be long: ends the page with the text that passes the byte budget.
SELECT *
  FROM (SELECT m.*,
               sum(octet_length(text_value)) OVER (
                   ORDER BY entity_id {direction}, attribute_id {direction}, ts {direction}
                   ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
               ) AS bytes_before
          FROM ({merged}) m) w
 WHERE coalesce(bytes_before, 0) < %(bytes)s

-- name: series_page
-- One row per series. Arrays, because decoding 50,000 rows value by value costs ten times as much as the read. The
-- rows come sorted and array_agg keeps the order of its input.
SELECT entity_id, attribute_id, array_agg(ts), array_agg(coalesce(revision, 0)), {arrays}
  FROM ({rows}) p
 GROUP BY entity_id, attribute_id
 ORDER BY entity_id {direction}, attribute_id {direction}

-- name: plan_for_constants
-- For list_entities: a condition that was not asked for then leaves no trace in the plan.
SELECT set_config('plan_cache_mode', 'force_custom_plan', true)

-- name: list_entities
SELECT external_id, entity_type, labels, created_at
  FROM entities
 WHERE tenant_id = %(tenant)s
   AND external_id > %(after)s::text
   AND (%(only)s::text IS NULL OR external_id = %(only)s::text)
   AND (%(type)s::text = '' OR entity_type = %(type)s::text)
   AND (%(labels)s::jsonb = '{}' OR labels @> %(labels)s::jsonb)
 ORDER BY external_id
 LIMIT %(limit)s

-- name: list_attributes
SELECT name, type::text, unit, keeps_latest, created_at
  FROM attributes
 WHERE tenant_id = %(tenant)s AND name > %(after)s::text
 ORDER BY name
 LIMIT %(limit)s

-- name: find_tenant
-- The only statement about tenants that are not named yet: it has to give the name its id.
SELECT tenant_id FROM public.tenants WHERE name = %(name)s
