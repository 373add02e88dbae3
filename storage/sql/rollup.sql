-- Statements of the worker that keeps rollups and projections: how it follows the outbox, and what it computes.

-- name: add_lanes
-- A consumer begins at the present: what was committed before is for the back-fills, which come after.
INSERT INTO outbox_consumers (consumer, lane, published)
SELECT 'rollup', lane, pg_current_snapshot() FROM settings CROSS JOIN LATERAL generate_series(0, lanes - 1) lane
ON CONFLICT DO NOTHING

-- name: adopt_lanes
-- The first act under a new lease: from here on every transaction of an earlier holder is refused.
UPDATE outbox_consumers SET epoch = %(epoch)s WHERE consumer = 'rollup' AND epoch <= %(epoch)s

-- name: forget_consumer
-- The worker is given up for good: the outbox is no longer kept for it, and what it kept up is not served.
DELETE FROM outbox_consumers WHERE consumer = 'rollup'

-- name: hold
-- The fence of every transaction: one worker at a time, and only the one with the newest lease.
SELECT FROM outbox_consumers WHERE consumer = 'rollup' AND lane = 0 AND epoch = %(epoch)s FOR UPDATE

-- name: look_at_lanes
-- As look_at_lane of the relay: the clock is read in a statement before the one that takes the snapshot.
SELECT clock_timestamp(), pg_is_in_recovery(), (SELECT system_identifier::text FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN '' ELSE left(pg_walfile_name(pg_current_wal_lsn()), 8) END,
       pg_postmaster_start_time(), pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
       lane, published::text, published_through, target::text, target_at, sent_xid::text::bigint, sent_id, server,
       timeline
  FROM outbox_consumers
 WHERE consumer = 'rollup' AND epoch = %(epoch)s
 ORDER BY lane

-- name: consistent
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ

-- name: take_snapshot
SELECT pg_current_snapshot()::text

-- name: store_lane
-- In the transaction that computed what the page made stale; and only on the server that it was read from.
UPDATE outbox_consumers
   SET published = %(published)s::pg_snapshot, published_through = %(published_through)s,
       target = %(target)s::pg_snapshot, target_at = %(target_at)s,
       sent_xid = %(sent_xid)s::xid8, sent_id = %(sent_id)s,
       server = %(server)s, timeline = %(timeline)s, updated_at = now()
 WHERE consumer = 'rollup' AND lane = %(lane)s AND epoch = %(epoch)s AND %(started)s = pg_postmaster_start_time()

-- name: rewind_lanes
-- After a failover: compute again whatever the outbox still holds. It is exact, and costs little.
UPDATE outbox_consumers
   SET published = '3:3:', published_through = NULL, target = NULL, target_at = NULL, sent_xid = NULL, sent_id = NULL,
       server = NULL, timeline = NULL
 WHERE consumer = 'rollup' AND epoch = %(epoch)s

-- name: restart_lanes
-- The database was copied to another server, where transaction ids mean nothing: begin at the present …
UPDATE outbox_consumers
   SET published = pg_current_snapshot(), published_through = NULL, target = NULL, target_at = NULL, sent_xid = NULL,
       sent_id = NULL, server = NULL, timeline = NULL
 WHERE consumer = 'rollup' AND epoch = %(epoch)s

-- name: restart_rollups
-- … and fill everything again.
UPDATE rollups SET state = 'pending', complete_from = NULL, backfill_entity = 0, problem = '' WHERE state <> 'dropping'

-- name: restart_projections
UPDATE projections SET state = 'pending', backfill_entity = 0, problem = '' WHERE state <> 'dropping'

-- name: suspend_rollups
-- Out of service, until they are filled anew: what the tenant's readings come to was refused, or passed over.
UPDATE rollups SET state = 'pending', complete_from = NULL, backfill_entity = 0, problem = %(problem)s
 WHERE tenant_id = %(tenant)s AND state <> 'dropping'
   AND (state, complete_from IS NULL, backfill_entity, problem) <> ('pending', true, 0, %(problem)s)

-- name: declared_rollups
SELECT r.tenant_id, a.attribute_id, a.type::text
  FROM rollups r JOIN attributes a ON a.tenant_id = r.tenant_id AND a.attribute_id = ANY (r.attribute_ids)
 WHERE r.state <> 'dropping'

-- name: declared_projections
SELECT p.projection_id, p.tenant_id, p.entity_type, array_agg(a.attribute_id ORDER BY a.attribute_id),
       array_agg(a.type::text ORDER BY a.attribute_id)
  FROM projections p JOIN attributes a ON a.tenant_id = p.tenant_id AND a.attribute_id = ANY (p.attribute_ids)
 WHERE p.state <> 'dropping'
 GROUP BY p.projection_id

-- name: floors
-- Where each tenant's readings begin to be gone: past its retention, or past one that it had. A bucket that begins
-- before is never computed again: from what is left it would come out wrong.
SELECT t.tenant_id, greatest(now() - t.retention, t.kept_from) FROM tenants t WHERE t.tenant_id = ANY (%(tenants)s)

-- name: ensure_rollups
SELECT ensure_rollups(%(from)s, %(to)s)

-- name: retire_rollups
SELECT retire_rollups()

-- name: compute_minutes
-- Minutes that the outbox says have changed, from all their readings: right whatever came late, twice or as a correction.
-- The range bounds the partitions; the key finds the readings of each minute.
WITH asked AS (
    SELECT * FROM unnest(%(entities)s, %(attributes)s, %(buckets)s) a (entity_id, attribute_id, bucket)
), found AS (
    SELECT a.*, r.*
      FROM asked a CROSS JOIN LATERAL (
           SELECT {aggregates} FROM entity_attributes_{type} h
            WHERE h.tenant_id = %(tenant)s AND h.entity_id = a.entity_id AND h.attribute_id = a.attribute_id
              AND h.ts >= a.bucket AND h.ts < a.bucket + interval '1 minute'
              AND h.ts >= %(from)s AND h.ts < %(to)s) r
), emptied AS (
    DELETE FROM rollup_minute_{type} m USING found f
     WHERE f.readings = 0 AND m.tenant_id = %(tenant)s AND m.entity_id = f.entity_id
       AND m.attribute_id = f.attribute_id AND m.bucket = f.bucket AND m.bucket >= %(from)s AND m.bucket < %(to)s
)
INSERT INTO rollup_minute_{type} AS m (tenant_id, entity_id, attribute_id, bucket, {columns})
SELECT %(tenant)s, f.* FROM found f WHERE f.readings > 0
ON CONFLICT (tenant_id, entity_id, attribute_id, bucket) DO UPDATE SET ({columns}) = ROW ({excluded})

-- name: compute_hours
-- Hours from their minutes.
WITH asked AS (
    SELECT * FROM unnest(%(entities)s, %(attributes)s, %(buckets)s) a (entity_id, attribute_id, bucket)
), found AS (
    SELECT a.*, r.*
      FROM asked a CROSS JOIN LATERAL (
           SELECT {merged}
             FROM (SELECT n.*, {mean} AS mean, {overall} AS overall
                     FROM rollup_minute_{type} n
                    WHERE n.tenant_id = %(tenant)s AND n.entity_id = a.entity_id AND n.attribute_id = a.attribute_id
                      AND n.bucket >= a.bucket AND n.bucket < a.bucket + interval '1 hour'
                      AND n.bucket >= %(from)s AND n.bucket < %(to)s
                   WINDOW w AS ()) h) r
), emptied AS (
    DELETE FROM rollup_hour_{type} m USING found f
     WHERE f.readings IS NULL AND m.tenant_id = %(tenant)s AND m.entity_id = f.entity_id
       AND m.attribute_id = f.attribute_id AND m.bucket = f.bucket AND m.bucket >= %(from)s AND m.bucket < %(to)s
)
INSERT INTO rollup_hour_{type} AS m (tenant_id, entity_id, attribute_id, bucket, {columns})
SELECT %(tenant)s, f.* FROM found f WHERE f.readings > 0
ON CONFLICT (tenant_id, entity_id, attribute_id, bucket) DO UPDATE SET ({columns}) = ROW ({excluded})

-- name: pending_rollup
-- The back-fill, newest first: the next stretch of the oldest declaration that is not done, of tenants that do not rest.
SELECT r.tenant_id, r.name, r.state, r.complete_from, r.backfill_entity, r.backfill_from,
       coalesce(r.complete_from,
                date_bin('6 hours', now() + t.window_future, '2000-01-01 00:00+00') + interval '6 hours'),
       greatest(r.backfill_from, now() - t.retention, t.kept_from,
                (SELECT min(h.ts_from) FROM history_partitions h
                  WHERE h.tenant_from = s.tenant_from AND h.retired_at IS NULL)),
       (SELECT array_agg(a.attribute_id) FROM attributes a
         WHERE a.tenant_id = r.tenant_id AND a.attribute_id = ANY (r.attribute_ids) AND a.type = 'double'),
       (SELECT array_agg(a.attribute_id) FROM attributes a
         WHERE a.tenant_id = r.tenant_id AND a.attribute_id = ANY (r.attribute_ids) AND a.type = 'bigint'),
       -- Before this no reading was ever stored, or all that were are gone.
       (SELECT min(h.ts_from) FROM history_partitions h
         WHERE h.tenant_from = s.tenant_from AND h.retired_at IS NULL)
  FROM rollups r JOIN tenants t USING (tenant_id) CROSS JOIN LATERAL tenant_slot(r.tenant_id) s
 WHERE r.state IN ('pending', 'backfilling') AND r.tenant_id <> ALL (%(resting)s)
 ORDER BY r.created_at, r.tenant_id, r.name
 LIMIT 1 FOR UPDATE OF r

-- name: stored_ahead
-- The end of the last range that holds readings of the tenant, as far as it lies beyond what may be written now: the
-- window may have been wider once.
SELECT max(h.ts_to)
  FROM tenants t CROSS JOIN LATERAL tenant_slot(t.tenant_id) s
  JOIN history_partitions h ON h.tenant_from = s.tenant_from
 WHERE t.tenant_id = %(tenant)s AND h.retired_at IS NULL AND h.ts_to > now() + t.window_future
   AND (EXISTS (SELECT FROM entity_attributes_double r
                 WHERE r.tenant_id = %(tenant)s AND r.ts >= h.ts_from AND r.ts < h.ts_to)
        OR EXISTS (SELECT FROM entity_attributes_bigint r
                    WHERE r.tenant_id = %(tenant)s AND r.ts >= h.ts_from AND r.ts < h.ts_to))

-- name: next_entities
SELECT entity_id FROM entities
 WHERE tenant_id = %(tenant)s AND entity_id > %(after)s AND (%(type)s::text = '' OR entity_type = %(type)s::text)
 ORDER BY entity_id LIMIT %(limit)s

-- name: clear_minutes
DELETE FROM rollup_minute_{type}
 WHERE tenant_id = %(tenant)s AND entity_id = ANY (%(entities)s) AND attribute_id = ANY (%(attributes)s)
   AND bucket >= %(from)s AND bucket < %(to)s

-- name: clear_hours
DELETE FROM rollup_hour_{type}
 WHERE tenant_id = %(tenant)s AND entity_id = ANY (%(entities)s) AND attribute_id = ANY (%(attributes)s)
   AND bucket >= %(from)s AND bucket < %(to)s

-- name: fill_minutes
INSERT INTO rollup_minute_{type} (tenant_id, entity_id, attribute_id, bucket, {columns})
SELECT %(tenant)s, h.entity_id, h.attribute_id, date_trunc('minute', h.ts, 'UTC'), {aggregates}
  FROM entity_attributes_{type} h
 WHERE h.tenant_id = %(tenant)s AND h.entity_id = ANY (%(entities)s) AND h.attribute_id = ANY (%(attributes)s)
   AND h.ts >= %(from)s AND h.ts < %(to)s
 GROUP BY 2, 3, 4

-- name: fill_hours
INSERT INTO rollup_hour_{type} (tenant_id, entity_id, attribute_id, bucket, {columns})
SELECT %(tenant)s, h.entity_id, h.attribute_id, h.hour, {merged}
  FROM (SELECT n.*, date_trunc('hour', n.bucket, 'UTC') AS hour, {mean} AS mean, {overall} AS overall
          FROM rollup_minute_{type} n
         WHERE n.tenant_id = %(tenant)s AND n.entity_id = ANY (%(entities)s) AND n.attribute_id = ANY (%(attributes)s)
           AND n.bucket >= %(from)s AND n.bucket < %(to)s
        WINDOW w AS (PARTITION BY n.entity_id, n.attribute_id, date_trunc('hour', n.bucket, 'UTC'))) h
 GROUP BY 2, 3, 4

-- name: move_rollup
UPDATE rollups
   SET state = %(state)s, complete_from = %(complete_from)s, backfill_entity = %(entity)s, problem = ''
 WHERE tenant_id = %(tenant)s AND name = %(name)s

-- name: dropped_rollup
-- What is left to remove: attributes that no other rollup has.
SELECT r.tenant_id, r.name, r.backfill_entity,
       (SELECT coalesce(array_agg(a), '{}') FROM unnest(r.attribute_ids) a
         WHERE NOT EXISTS (SELECT FROM rollups o
                            WHERE o.tenant_id = r.tenant_id AND o.state <> 'dropping' AND a = ANY (o.attribute_ids)))
  FROM rollups r WHERE r.state = 'dropping' ORDER BY r.created_at LIMIT 1 FOR UPDATE

-- name: clear_entities
DELETE FROM rollup_{unit}_{type}
 WHERE tenant_id = %(tenant)s AND entity_id = ANY (%(entities)s) AND attribute_id = ANY (%(attributes)s)

-- name: remove_rollup
DELETE FROM rollups WHERE tenant_id = %(tenant)s AND name = %(name)s AND state = 'dropping'

-- name: measure
-- How far behind the worker is, in seconds, NULL before its first round; and what is left to do.
SELECT (SELECT extract(epoch FROM clock_timestamp() - min(published_through))::float8
          FROM outbox_consumers WHERE consumer = 'rollup'),
       (SELECT count(*) FROM rollups WHERE state IN ('pending', 'backfilling'))
       + (SELECT count(*) FROM projections WHERE state IN ('pending', 'backfilling')),
       (SELECT count(*) FROM rollups WHERE state = 'pending' AND problem <> '')
       + (SELECT count(*) FROM projections WHERE state = 'pending' AND problem <> ''),
       count(*), count(*) FILTER (WHERE problem <> ''),
       coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8
  FROM entity_deletions WHERE ended_at IS NULL

-- name: plan_pages
-- A page must come off the index in order, and stop when it is full; see relay_pool().
SELECT set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('enable_sort', 'off', true), set_config('enable_incremental_sort', 'off', true),
       set_config('plan_cache_mode', 'force_generic_plan', true)
