-- The catalog of a local warehouse. Parameters are psycopg's.

-- name: lock_generation
-- Shared by loads, exclusive for a rebuild's first and last step: a load can then not slip in between. Locks are
-- always taken in this order: generation, load states by partition, files.
SELECT generation, rebuilding FROM warehouse.generation FOR SHARE

-- name: lock_generation_exclusively
SELECT generation, rebuilding FROM warehouse.generation FOR UPDATE

-- name: generation
SELECT generation FROM warehouse.generation

-- name: set_generation
UPDATE warehouse.generation SET generation = %(generation)s, rebuilding = %(rebuilding)s

-- name: states
SELECT s.partition, s.topic_id, s.next_offset, g.generation,
       CASE WHEN g.rebuilding IS NULL THEN s.halted ELSE 'a rebuild is under way or was not finished' END, s.snapshot
  FROM warehouse.load_state s CROSS JOIN warehouse.generation g
 ORDER BY s.partition

-- name: rebuild_floors
SELECT tenant_id, floor_us FROM warehouse.rebuild_floors

-- name: lock_states
-- First in every load: whoever holds the rows decides on the offsets. By partition, so that two loads of several
-- partitions cannot wait for each other.
SELECT partition, topic_id, next_offset, halted, snapshot, snapshot_through_us FROM warehouse.load_state
 WHERE partition = ANY(%(partitions)s) ORDER BY partition FOR UPDATE

-- name: open_partition
INSERT INTO warehouse.load_state (partition, topic_id, next_offset) VALUES (%(partition)s, %(topic_id)s, %(offset)s)
ON CONFLICT (partition) DO NOTHING

-- name: halt
UPDATE warehouse.load_state SET halted = %(reason)s, updated_at = now()
 WHERE partition = %(partition)s AND halted = ''
   AND (SELECT generation FROM warehouse.generation) = %(generation)s

-- name: advance
UPDATE warehouse.load_state SET next_offset = %(end)s, updated_at = now() WHERE partition = %(partition)s

-- name: forget_snapshot
-- Every lane's watermark has passed the rebuild's snapshot: what it held has gone by. Kept any longer, the snapshot
-- would hide changes of a database that was restored and uses transaction ids again.
UPDATE warehouse.load_state s SET snapshot = NULL, snapshot_through_us = NULL
 WHERE s.partition = ANY(%(partitions)s) AND s.snapshot IS NOT NULL
   AND (SELECT count(*) >= max(w.lanes) FROM warehouse.watermarks w
         WHERE w.partition = s.partition AND w.complete_through_us > s.snapshot_through_us)

-- name: known_batches
-- Under the lock of their partition: a change record always comes in the same partition.
SELECT b.batch_id, b.tenant_id, b.bucket, b.deletes, b.part
  FROM unnest(%(ids)s::uuid[], %(tenants)s::integer[], %(buckets)s::smallint[], %(deletes)s::boolean[],
              %(parts)s::integer[]) AS n (batch_id, tenant_id, bucket, deletes, part)
  JOIN warehouse.batches b USING (batch_id, tenant_id, bucket, deletes, part)

-- name: copy_batches
COPY warehouse.batches (batch_id, tenant_id, bucket, deletes, part) FROM STDIN

-- name: add_file
INSERT INTO warehouse.files (kind, path, rows, bytes, min_tenant, max_tenant, min_ts_us, max_ts_us)
VALUES (%(kind)s, %(path)s, %(rows)s, %(bytes)s, %(min_tenant)s, %(max_tenant)s, %(min_ts_us)s, %(max_ts_us)s)

-- name: put_watermark
-- A relay that lost its lease may still write for a moment: its smaller epoch is ignored. Time never goes back.
INSERT INTO warehouse.watermarks AS w (lane, partition, lanes, partitions, complete_through_us, lease_epoch)
VALUES (%(lane)s, %(partition)s, %(lanes)s, %(partitions)s, %(complete_through_us)s, %(lease_epoch)s)
ON CONFLICT (lane, partition) DO UPDATE
   SET lanes = excluded.lanes, partitions = excluded.partitions, lease_epoch = excluded.lease_epoch,
       complete_through_us = greatest(w.complete_through_us, excluded.complete_through_us)
 WHERE excluded.lease_epoch >= w.lease_epoch

-- name: add_dead_letter
INSERT INTO warehouse.dead_letters
       (topic_id, partition, record_offset, reason, affects_readings, tenant_id, bucket, min_ts_us, max_ts_us)
VALUES (%(topic_id)s, %(partition)s, %(offset)s, %(reason)s, %(affects_readings)s, %(tenant_id)s, %(bucket)s,
        %(min_ts_us)s, %(max_ts_us)s)
ON CONFLICT DO NOTHING

-- name: dead_letters
SELECT partition, record_offset, reason, affects_readings, tenant_id, bucket, min_ts_us, max_ts_us
  FROM warehouse.dead_letters WHERE redriven_at IS NULL ORDER BY partition, record_offset

-- name: redriven
-- No row: somebody else redrove it.
UPDATE warehouse.dead_letters SET redriven_at = now()
 WHERE partition = %(partition)s AND record_offset = %(offset)s AND redriven_at IS NULL
RETURNING partition

-- name: all_redriven
UPDATE warehouse.dead_letters SET redriven_at = now() WHERE redriven_at IS NULL

-- name: as_of
-- The least of all watermarks, if there is one of every lane in every partition.
SELECT CASE WHEN count(*) >= max(lanes) * max(partitions) THEN min(complete_through_us) END FROM warehouse.watermarks

-- name: lanes_loaded
SELECT lane, min(complete_through_us) FROM warehouse.watermarks GROUP BY lane HAVING count(*) >= max(partitions)

-- name: complete_from
SELECT max(from_us) FROM warehouse.complete_from WHERE %(tenant_id)s::integer IS NULL OR tenant_id IN (0, %(tenant_id)s)

-- name: put_complete_from
INSERT INTO warehouse.complete_from AS c (tenant_id, from_us) VALUES (%(tenant_id)s, %(from_us)s)
ON CONFLICT (tenant_id) DO UPDATE SET from_us = greatest(c.from_us, excluded.from_us)

-- name: halted
SELECT DISTINCT halted FROM warehouse.load_state WHERE halted <> '' ORDER BY 1

-- name: files
-- The files in use that may hold something of a scope.
SELECT file_id, kind, path, rows, bytes, min_tenant, max_tenant, min_ts_us, max_ts_us FROM warehouse.files
 WHERE removed_at IS NULL
   AND (%(tenant_id)s::integer IS NULL OR %(tenant_id)s BETWEEN min_tenant AND max_tenant)
   AND (%(from_us)s::bigint IS NULL OR max_ts_us IS NULL OR max_ts_us >= %(from_us)s)
   AND (%(to_us)s::bigint IS NULL OR min_ts_us IS NULL OR min_ts_us < %(to_us)s)
 ORDER BY file_id

-- name: remove_files
-- Fewer rows than asked for: another process replaced some, and this one's result is worthless.
UPDATE warehouse.files SET removed_at = now() WHERE file_id = ANY(%(file_ids)s) AND removed_at IS NULL

-- name: forget_removed
DELETE FROM warehouse.files WHERE removed_at < now() - make_interval(secs => %(grace_s)s) RETURNING path

-- name: all_paths
SELECT path FROM warehouse.files

-- name: forget_batches
DELETE FROM warehouse.batches WHERE loaded_at < now() - make_interval(secs => %(age_s)s)

-- name: try_upkeep_lock
-- The session's: it ends with the connection, also when this process is killed.
SELECT pg_try_advisory_lock(hashtext('atlasco.warehouse.upkeep'))

-- name: upkeep_lock
SELECT pg_advisory_lock(hashtext('atlasco.warehouse.upkeep'))

-- name: release_upkeep_lock
SELECT pg_advisory_unlock(hashtext('atlasco.warehouse.upkeep'))

-- name: has_catalog
SELECT to_regclass('warehouse.generation') IS NOT NULL

-- name: reset_partitions
DELETE FROM warehouse.load_state

-- name: rebuilt_partition
INSERT INTO warehouse.load_state (partition, topic_id, next_offset, snapshot, snapshot_through_us)
VALUES (%(partition)s, %(topic_id)s, %(offset)s, %(snapshot)s, %(through_us)s)

-- name: reset_floors
DELETE FROM warehouse.rebuild_floors

-- name: add_floor
INSERT INTO warehouse.rebuild_floors (tenant_id, floor_us) VALUES (%(tenant_id)s, %(floor_us)s)

-- name: reset_watermarks
DELETE FROM warehouse.watermarks
