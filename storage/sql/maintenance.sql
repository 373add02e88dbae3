-- Statements of storage/partitions.py and storage/maintenance.py.

-- name: set_lock_timeout
-- Milliseconds, for this transaction: whoever waits for a table lock makes everybody behind it wait too.
SELECT set_config('lock_timeout', %s, true)

-- name: ensure_history
SELECT ensure_history(%s, %s, %s)

-- name: ensure_outbox
SELECT ensure_outbox(now(), least(%s, now() + interval '8 days' - interval '1 hour'))

-- name: ranges_of_slot
-- As days since 1970: every range begins and ends at midnight UTC.
SELECT (extract(epoch FROM ts_from) / 86400)::bigint, (extract(epoch FROM ts_to) / 86400)::bigint,
       retired_at IS NOT NULL
  FROM history_partitions
 WHERE tenant_from = %s
 ORDER BY ts_from

-- name: be_the_only_one
-- Held by the session: it ends with the connection, also when the process is killed.
SELECT pg_try_advisory_lock(hashtext('atlasco.maintenance'))

-- name: slots_to_prepare
-- For each customer partition that has tenants: the tenant with the widest window, on whose behalf ranges are made,
-- and the time they should span. Not further back than days are made at all (35 days): months of old history appear
-- with their first reading, else a window of 20 years would cost every slot 960 tables that may stay empty.
SELECT s.tenant_from,
       (array_agg(t.tenant_id ORDER BY t.window_past DESC))[1],
       date_trunc('day', now() - least(max(t.window_past), interval '35 days'), 'UTC'),
       now() + greatest(%s::interval, max(t.window_future))
  FROM tenants t CROSS JOIN LATERAL tenant_slot(t.tenant_id) s
 GROUP BY s.tenant_from
 ORDER BY s.tenant_from

-- name: retire_ranges
-- Ranges older than every tenant of their slot keeps. The hour is for the difference of clocks, and for readings that
-- were let in just inside the window and are still on their way.
UPDATE history_partitions h
   SET retired_at = now()
  FROM (SELECT s.tenant_from, max(t.retention) AS retention
          FROM tenants t CROSS JOIN LATERAL tenant_slot(t.tenant_id) s
         GROUP BY s.tenant_from) longest
 WHERE h.tenant_from = longest.tenant_from
   AND h.retired_at IS NULL
   AND h.ts_to < now() - longest.retention - interval '1 hour'
RETURNING h.suffix

-- name: leaves_of_retired_ranges
-- What is left to do: tables that still exist, with their parent while they are attached, interrupted detachments
-- first (a parent has one at a time).
SELECT c.relname::text, p.relname::text, coalesce(i.inhdetachpending, false)
  FROM history_partitions h
 CROSS JOIN unnest(enum_range(NULL::attribute_type)) v (type)
  JOIN pg_class c ON c.relname = format('entity_attributes_%%s_%%s', v.type, h.suffix)::name
                 AND c.relnamespace = 'public'::regnamespace
  LEFT JOIN pg_inherits i ON i.inhrelid = c.oid
  LEFT JOIN pg_class p ON p.oid = i.inhparent
 WHERE h.retired_at IS NOT NULL
   AND (%s::text IS NULL OR c.relname = %s)
 ORDER BY coalesce(i.inhdetachpending, false) DESC, h.ts_from, h.suffix, v.type

-- name: detach
ALTER TABLE {parent} DETACH PARTITION {leaf} CONCURRENTLY

-- name: finish_detach
ALTER TABLE {parent} DETACH PARTITION {leaf} FINALIZE

-- name: drop_leaf
DROP TABLE {leaf}

-- name: ranges_past_a_retention
-- Live ranges that lie wholly past the retention of some tenants of their slot, with those tenants.
SELECT h.suffix, h.ts_to, array_agg(t.tenant_id ORDER BY t.tenant_id)
  FROM tenants t
 CROSS JOIN LATERAL tenant_slot(t.tenant_id) s
  JOIN history_partitions h ON h.tenant_from = s.tenant_from
 WHERE h.retired_at IS NULL
   AND h.ts_to < now() - t.retention - interval '1 hour'
 GROUP BY h.suffix, h.ts_from, h.ts_to
 ORDER BY h.ts_from, h.suffix

-- name: give_up_range
-- Before the first row goes: from when on tenants' readings are whole. Asked again who they are, for a retention may
-- have been raised since the ranges were listed.
UPDATE tenants SET kept_from = greatest(kept_from, %(to)s)
 WHERE tenant_id = ANY (%(tenants)s::integer[]) AND %(to)s < now() - retention - interval '1 hour'
RETURNING tenant_id

-- name: tenants_in_leaf
-- An index probe per tenant: a leaf that was cleared before costs no scan.
SELECT array_agg(u.tenant_id) FROM unnest(%s::integer[]) u (tenant_id)
 WHERE EXISTS (SELECT FROM {table} d WHERE d.tenant_id = u.tenant_id)

-- name: blocks
SELECT (pg_relation_size(%s::regclass) / current_setting('block_size')::integer)::bigint

-- name: delete_tenants_from_leaf
-- By ranges of pages: every page is read once, and a statement's work and locks are bounded. SKIP LOCKED: a statement
-- that never waits for a row cannot be part of a deadlock; what it skips, the next run finds.
DELETE FROM {table} WHERE ctid = ANY (ARRAY(
    SELECT d.ctid FROM {table} d
     WHERE d.ctid >= %(from)s::tid AND d.ctid < %(to)s::tid AND d.tenant_id = ANY (%(tenants)s::integer[])
       FOR UPDATE OF d SKIP LOCKED))

-- name: leaves_of_latest_values
SELECT relid::text FROM pg_partition_tree('latest_values') WHERE isleaf ORDER BY 1

-- name: delete_latest_past_retention
-- See delete_tenants_from_leaf. Gateways update these rows in the order of their key, this statement meets them in
-- the order of the pages: it must not wait. The hour: a retention that is just being raised, and that this statement
-- does not see yet, has noted the time before as the one from which on everything is kept.
DELETE FROM {table} WHERE ctid = ANY (ARRAY(
    SELECT d.ctid FROM {table} d JOIN tenants t ON t.tenant_id = d.tenant_id
     WHERE d.ctid >= %(from)s::tid AND d.ctid < %(to)s::tid AND d.ts < now() - t.retention - interval '1 hour'
       FOR UPDATE OF d SKIP LOCKED))

-- name: expire_device_sessions
DELETE FROM device_sessions WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM device_sessions WHERE seen_at < now() - %s::interval
     ORDER BY seen_at LIMIT %s FOR UPDATE SKIP LOCKED))

-- name: expire_stream_rejections
DELETE FROM stream_rejections WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM stream_rejections WHERE created_at < now() - %s::interval
     ORDER BY created_at LIMIT %s FOR UPDATE SKIP LOCKED))

-- name: expire_write_requests
DELETE FROM write_requests WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM write_requests WHERE created_at < now() - %s::interval
     ORDER BY created_at LIMIT %s FOR UPDATE SKIP LOCKED))

-- name: expire_dictionaries
DELETE FROM dictionaries WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM dictionaries WHERE last_used < now() - %s::interval
     LIMIT %s FOR UPDATE SKIP LOCKED))

-- name: outbox_partitions
-- The names end in the hour, so their order is that of time.
SELECT c.relname::text, pg_relation_size(c.oid), pg_total_relation_size(c.oid)
  FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
 WHERE i.inhparent = 'outbox'::regclass
 ORDER BY c.relname

-- name: oldest_batch
-- By the index on xid: the oldest transaction's batch is the oldest, or near enough for a gauge.
SELECT created_at FROM {table} ORDER BY xid, id LIMIT 1

-- name: table_sizes
-- Rows as the planner last counted them: counting for real would read everything.
SELECT n.name, coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint,
       coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint, count(*) FILTER (WHERE p.isleaf)
  FROM unnest(ARRAY['entity_attributes_double', 'entity_attributes_bigint', 'entity_attributes_boolean',
                    'entity_attributes_text', 'latest_values', 'entities', 'attributes', 'device_streams',
                    'device_sessions', 'stream_rejections', 'write_requests', 'dictionaries', 'quarantine',
                    'outbox']) WITH ORDINALITY n (name, place)
 CROSS JOIN LATERAL pg_partition_tree(n.name::regclass) p
  JOIN pg_class c ON c.oid = p.relid AND p.isleaf AND c.relkind = 'r'
 GROUP BY n.name, n.place
 ORDER BY n.place
