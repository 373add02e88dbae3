-- Statements of the relay: leases, the drain of the outbox, its measures and its retirement.

-- name: add_lease_items
-- The pieces of work of a scope, free at first.
INSERT INTO leases (scope, item)
SELECT %(scope)s, item FROM unnest(%(items)s::integer[]) item
ON CONFLICT DO NOTHING

-- name: join_leases
-- A process says that it lives and wants its share.
INSERT INTO lease_members (scope, member, label, expires_at)
VALUES (%(scope)s, %(member)s, %(label)s, clock_timestamp() + %(ttl)s)
ON CONFLICT (scope, member) DO UPDATE SET expires_at = excluded.expires_at

-- name: forget_members
-- Those that died without a word, long enough ago that nobody wonders about them.
DELETE FROM lease_members WHERE scope = %(scope)s AND expires_at < clock_timestamp() - interval '1 hour'

-- name: renew_leases
-- Also one that has expired, as long as nobody else took it: its epoch still stands.
UPDATE leases SET expires_at = clock_timestamp() + %(ttl)s
 WHERE scope = %(scope)s AND holder = %(member)s
RETURNING item, epoch

-- name: live_members
SELECT member FROM lease_members WHERE scope = %(scope)s AND expires_at > clock_timestamp() ORDER BY member

-- name: claim_leases
-- Takes free and expired items. The epoch follows the clock so that it grows across a restore, too: consumers that saw
-- the tokens of the lost past must not take the new ones for old.
UPDATE leases l
   SET holder = %(member)s, expires_at = clock_timestamp() + %(ttl)s,
       epoch = greatest(l.epoch + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
  FROM (SELECT item FROM leases
         WHERE scope = %(scope)s AND (holder IS NULL OR expires_at < clock_timestamp())
           AND holder IS DISTINCT FROM %(member)s
         ORDER BY item LIMIT %(wanted)s FOR UPDATE SKIP LOCKED) free
 WHERE l.scope = %(scope)s AND l.item = free.item
RETURNING l.item, l.epoch

-- name: release_leases
UPDATE leases SET holder = NULL, expires_at = '-infinity'
 WHERE scope = %(scope)s AND holder = %(member)s AND item = ANY (%(items)s)

-- name: leave_leases
-- Others need not wait for the expiry of one who says goodbye.
DELETE FROM lease_members WHERE scope = %(scope)s AND member = %(member)s

-- name: number_of_lanes
SELECT lanes FROM settings

-- name: add_lanes
INSERT INTO relay_lanes (lane) SELECT generate_series(0, %(lanes)s - 1) ON CONFLICT DO NOTHING

-- name: adopt_lane
-- The first act under a new lease: from here on the cursor refuses whoever held the lane before.
UPDATE relay_lanes SET epoch = %(epoch)s WHERE lane = %(lane)s AND epoch <= %(epoch)s

-- name: look_at_lane
-- The clock, where this is, and the cursor. The clock is read in a statement of its own, before the one that takes the
-- snapshot of the page: see storage.relay.drain.
SELECT clock_timestamp() AS clock,
       pg_is_in_recovery() AS standby,
       (SELECT system_identifier::text FROM pg_control_system()) AS server_now,
       CASE WHEN pg_is_in_recovery() THEN '' ELSE left(pg_walfile_name(pg_current_wal_lsn()), 8) END AS timeline_now,
       pg_postmaster_start_time() AS started,
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS next_xid,
       published::text, published_through, target::text, target_at,
       sent_xid::text::bigint, sent_id, server, timeline, topic_id
  FROM relay_lanes
 WHERE lane = %(lane)s AND epoch = %(epoch)s

-- name: page_mode
-- The page's snapshot must be one snapshot: the target that is read and the rows that are visible have to agree.
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY

-- name: take_snapshot
SELECT pg_current_snapshot()::text

-- name: read_page
-- Batches of a lane that are visible in the target and not in the snapshot published last, after the one sent last, in
-- the order (xid, id). "Not visible in the published snapshot" is written as what it means, "was open then, or began
-- later", because both are ranges of the index: the cost stays that of what is new, also while one transaction stays
-- open for hours. At least one row, however large, if there is any.
SELECT xid::text::bigint, id, batch_id, changes, payload
  FROM (SELECT page.*, sum(octet_length(payload)) OVER (ORDER BY xid, id) - octet_length(payload) AS bytes_before
          FROM ((SELECT xid, id, batch_id, changes, payload FROM outbox
                  WHERE lane = %(lane)s AND xid = ANY (%(published_open)s::xid8[])
                    AND pg_visible_in_snapshot(xid, %(target)s::pg_snapshot)
                    AND (xid, id) > (%(sent_xid)s::xid8, %(sent_id)s::bigint)
                  ORDER BY xid, id LIMIT %(rows)s)
                UNION ALL
                (SELECT xid, id, batch_id, changes, payload FROM outbox
                  WHERE lane = %(lane)s AND xid >= %(published_end)s::xid8
                    AND xid < pg_snapshot_xmax(%(target)s::pg_snapshot)
                    AND pg_visible_in_snapshot(xid, %(target)s::pg_snapshot)
                    AND (xid, id) > (%(sent_xid)s::xid8, %(sent_id)s::bigint)
                  ORDER BY xid, id LIMIT %(rows)s)
                ORDER BY xid, id LIMIT %(rows)s) page) measured
 WHERE bytes_before < %(bytes)s
 ORDER BY xid, id

-- name: store_cursor
-- Only under the lease that read the page, and only on the server it was read from: after a failover, transaction ids
-- of the lost past belong to other transactions.
UPDATE relay_lanes
   SET published = %(published)s::pg_snapshot, published_through = %(published_through)s,
       target = %(target)s::pg_snapshot, target_at = %(target_at)s,
       sent_xid = %(sent_xid)s::xid8, sent_id = %(sent_id)s,
       server = %(server)s, timeline = %(timeline)s, topic_id = %(topic_id)s, updated_at = now()
 WHERE lane = %(lane)s AND epoch = %(epoch)s
   AND %(server)s = (SELECT system_identifier::text FROM pg_control_system())
   AND %(timeline)s = CASE WHEN pg_is_in_recovery() THEN '' ELSE left(pg_walfile_name(pg_current_wal_lsn()), 8) END
   AND %(started)s = pg_postmaster_start_time()

-- name: rewind_lane
-- Publishes again whatever is still in the outbox.
UPDATE relay_lanes
   SET published = '3:3:', published_through = NULL, target = NULL, target_at = NULL, sent_xid = NULL, sent_id = NULL,
       checkpoint = NULL, checkpoint_at = NULL, loaded = CASE WHEN %(renumbered)s THEN '3:3:' ELSE loaded END,
       server = %(server)s, timeline = %(timeline)s, topic_id = %(topic_id)s, updated_at = now()
 WHERE lane = %(lane)s AND epoch = %(epoch)s

-- name: renumber_lane
-- The rows were copied from another server, whose transaction ids mean nothing here: they count as written now.
UPDATE outbox SET xid = pg_current_xact_id() WHERE lane = %(lane)s

-- name: confirm_checkpoints
-- A published state that the loader has passed becomes what is known to be loaded, and the present one the next to
-- wait for. The margin covers clocks that differ between a primary and the one that replaced it.
UPDATE relay_lanes r
   SET loaded = r.checkpoint, checkpoint = r.published, checkpoint_at = r.published_through
  FROM loaded_lanes l
 WHERE l.lane = r.lane AND l.loaded_through >= r.checkpoint_at + %(margin)s AND r.published_through IS NOT NULL

-- name: begin_checkpoints
UPDATE relay_lanes SET checkpoint = published, checkpoint_at = published_through
 WHERE checkpoint IS NULL AND published_through IS NOT NULL

-- name: retire_outbox
SELECT leaf, outcome, reason FROM retire_outbox(%(after)s, %(margin)s)

-- name: measure_lanes
-- What is committed and not published, counted up to a bound so that looking at a huge backlog stays cheap.
SELECT r.lane, coalesce(extract(epoch FROM clock_timestamp() - w.oldest), 0)::float8, w.batches,
       extract(epoch FROM clock_timestamp() - r.published_through)::float8
  FROM relay_lanes r
 CROSS JOIN LATERAL (
       SELECT min(created_at) AS oldest, count(*) AS batches
         FROM ((SELECT created_at FROM outbox
                 WHERE lane = r.lane AND xid >= pg_snapshot_xmax(r.published)
                   AND (r.sent_xid IS NULL OR (xid, id) > (r.sent_xid, r.sent_id))
                 ORDER BY xid, id LIMIT %(most)s)
               UNION ALL
               (SELECT created_at FROM outbox
                 WHERE lane = r.lane AND xid = ANY (ARRAY(SELECT pg_snapshot_xip(r.published)))
                   AND (r.sent_xid IS NULL OR (xid, id) > (r.sent_xid, r.sent_id))
                 LIMIT %(most)s)) waiting) w
 ORDER BY r.lane

-- name: measure_outbox
-- Size on disk, published and unpublished.
SELECT coalesce(sum(pg_total_relation_size(inhrelid)), 0)::bigint FROM pg_inherits WHERE inhparent = 'outbox'::regclass
