-- Statements of the write transaction, in the order it runs them.

-- name: fence_streams
-- Locks the devices of the batch in key order (so that two transactions cannot deadlock), lets through those whose
-- stream is still the newest, and moves their committed sequence. Says, for each one let through, where it stood:
-- messages at or below that were committed before. A device that is missing in the answer has a newer stream.
WITH asked AS (
    SELECT * FROM unnest(%(tenant)s, %(entity)s, %(epoch)s, %(sequence)s) a (tenant_id, entity_id, epoch, sequence)
), locked AS (
    SELECT s.tenant_id, s.entity_id, s.committed_sequence, a.sequence
      FROM asked a
      JOIN device_streams s ON s.tenant_id = a.tenant_id AND s.entity_id = a.entity_id AND s.epoch = a.epoch
     ORDER BY s.tenant_id, s.entity_id
       FOR NO KEY UPDATE OF s
), advanced AS (
    UPDATE device_streams s
       SET committed_sequence = greatest(l.committed_sequence, l.sequence), seen_at = now()
      FROM locked l
     WHERE s.tenant_id = l.tenant_id AND s.entity_id = l.entity_id
    RETURNING s.entity_id, l.committed_sequence
)
SELECT array_agg(entity_id), array_agg(committed_sequence) FROM advanced

-- name: merge_history
-- The way of a batch that holds readings which are already there: the same value changes nothing, another value is
-- a correction and takes the next revision under the row's lock. Says what really changed, and nothing else: that is
-- what the outbox carries. {type} is a value type.
WITH changed AS (
    INSERT INTO entity_attributes_{type} AS h (tenant_id, entity_id, attribute_id, ts, value)
    SELECT * FROM unnest(%(tenant)s, %(entity)s, %(attribute)s, %(ts)s, %(value)s)
    ON CONFLICT (tenant_id, entity_id, attribute_id, ts)
    DO UPDATE SET value = excluded.value, revision = coalesce(h.revision, 0) + 1
     WHERE h.value IS DISTINCT FROM excluded.value
    RETURNING h.tenant_id, h.entity_id, h.attribute_id, (extract(epoch FROM h.ts) * 1000000)::bigint AS time_us,
              coalesce(h.revision, 0) AS revision
)
SELECT array_agg(tenant_id), array_agg(entity_id), array_agg(attribute_id), array_agg(time_us), array_agg(revision)
  FROM changed

-- name: raise_latest
-- The newest timestamp wins; at the same timestamp this write is the newest one, hence a correction.
INSERT INTO latest_values AS l (tenant_id, entity_id, attribute_id, ts, {type}_value)
SELECT * FROM unnest(%(tenant)s, %(entity)s, %(attribute)s, %(ts)s, %(value)s)
ON CONFLICT (tenant_id, entity_id, attribute_id)
DO UPDATE SET ts = excluded.ts, {type}_value = excluded.{type}_value
 WHERE excluded.ts > l.ts OR (excluded.ts = l.ts AND excluded.{type}_value IS DISTINCT FROM l.{type}_value)

-- name: correct_latest
-- raise_latest for a batch that corrects back-filled readings as well. These do not move a latest value, but must reach
-- the one that holds the very reading, or latest and history would disagree for ever. One statement for both, and one
-- row for each latest value, in the order of the batch: two statements, or an UPDATE with a join, would lock the rows
-- in an order of their own, and two writers could deadlock. What latest holds at that timestamp cannot change under
-- this transaction: it has locked the reading in history.
WITH contender AS (
    SELECT c.tenant_id, c.entity_id, c.attribute_id, c.ts, c.value, c.place,
           row_number() OVER (PARTITION BY c.tenant_id, c.entity_id, c.attribute_id ORDER BY c.ts DESC) AS rank
      FROM unnest(%(tenant)s, %(entity)s, %(attribute)s, %(ts)s, %(value)s, %(historical)s)
           WITH ORDINALITY c (tenant_id, entity_id, attribute_id, ts, value, historical, place)
     WHERE NOT c.historical OR EXISTS (
           SELECT FROM latest_values l
            WHERE l.tenant_id = c.tenant_id AND l.entity_id = c.entity_id AND l.attribute_id = c.attribute_id
              AND l.ts = c.ts)
)
INSERT INTO latest_values AS l (tenant_id, entity_id, attribute_id, ts, {type}_value)
SELECT tenant_id, entity_id, attribute_id, ts, value FROM contender WHERE rank = 1 ORDER BY place
ON CONFLICT (tenant_id, entity_id, attribute_id)
DO UPDATE SET ts = excluded.ts, {type}_value = excluded.{type}_value
 WHERE excluded.ts > l.ts OR (excluded.ts = l.ts AND excluded.{type}_value IS DISTINCT FROM l.{type}_value)

-- name: store_rejections
-- Told again after every reconnect until the device confirms them; so they commit with the sequence they belong to.
INSERT INTO stream_rejections (tenant_id, entity_id, session_id, sequence, rejections)
SELECT * FROM unnest(%(tenant)s, %(entity)s, %(session)s, %(sequence)s, %(rejections)s)
ON CONFLICT DO NOTHING

-- name: stored_rejections
-- What repeated messages were rejected for when they committed.
SELECT r.tenant_id, r.entity_id, r.session_id, r.sequence, r.rejections
  FROM unnest(%(tenant)s, %(entity)s, %(session)s, %(sequence)s) a (tenant_id, entity_id, session_id, sequence)
  JOIN stream_rejections r USING (tenant_id, entity_id, session_id, sequence)

-- name: set_aside
-- Readings outside the clock window of a tenant that wants them kept.
INSERT INTO quarantine (tenant_id, entity_id, attribute_id, ts, {type}_value, reason)
SELECT *, 'outside the clock window' FROM unnest(%(tenant)s, %(entity)s, %(attribute)s, %(ts)s, %(value)s)

-- name: append_outbox
-- What the transaction changed, for the relay. One row, so that the log sees a transaction whole or not at all.
INSERT INTO outbox (lane, batch_id, changes, tenant_ids, min_ts, max_ts, payload)
VALUES (%(lane)s, %(batch)s, %(changes)s, %(tenants)s, %(min_ts)s, %(max_ts)s, %(payload)b)

-- name: writing_transaction
-- The id that a read token carries.
SELECT pg_current_xact_id()::text::bigint

-- name: store_write_request
-- A retry that loses this race fails on the key, rolls back, and is answered with what is stored here.
INSERT INTO write_requests (tenant_id, request_id, digest, response)
VALUES (%(tenant)s, %(request)s, %(digest)s, %(response)s)

-- name: find_write_request
-- Asked before the work, and again after losing the race.
SELECT digest, response FROM write_requests WHERE tenant_id = %(tenant)s AND request_id = %(request)s

-- name: ensure_outbox
-- A gateway looks after the outbox's partitions itself: without one, nothing could be written.
SELECT ensure_outbox(now(), now() + interval '3 hours')
