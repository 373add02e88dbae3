-- Statements of storage/quarantine.py: readings that were set aside become history.

-- name: tenant
-- With the clock that received_at was taken from.
SELECT tenant_id, now() FROM tenants WHERE name = %(name)s

-- name: fixed_settings
SELECT buckets, lanes FROM settings

-- name: named
-- Whether the device and the attribute that a release is limited to exist; NULL where it is not limited to one.
SELECT (SELECT entity_id FROM entities WHERE tenant_id = %(tenant)s AND external_id = %(device)s),
       (SELECT attribute_id FROM attributes WHERE tenant_id = %(tenant)s AND name = %(attribute)s)

-- name: candidates
-- The next readings to release, without a lock, in the order they were set aside: of two values for one key the one
-- that came last is written last. The clock window is judged by the database's clock, as the partitions are, and never
-- reaches behind the retention.
SELECT q.quarantine_id, q.entity_id, e.external_id, q.attribute_id, a.name, a.type::text, a.keeps_latest,
       (extract(epoch FROM q.ts) * 1000000)::bigint,
       q.double_value, q.bigint_value, q.boolean_value, convert_to(q.text_value, 'UTF8'),
       CASE WHEN q.ts < now() - least(t.window_past, t.retention) THEN -1
            WHEN q.ts > now() + t.window_future THEN 1 ELSE 0 END
  FROM quarantine q
  JOIN tenants t USING (tenant_id)
  LEFT JOIN entities e USING (tenant_id, entity_id)
  LEFT JOIN attributes a USING (tenant_id, attribute_id)
 WHERE q.tenant_id = %(tenant)s AND q.quarantine_id > %(after)s AND q.received_at < %(before)s
   AND (%(entity)s::bigint IS NULL OR q.entity_id = %(entity)s)
   AND (%(attribute)s::integer IS NULL OR q.attribute_id = %(attribute)s)
 ORDER BY q.quarantine_id
 LIMIT %(limit)s

-- name: take
-- The first statement of a release's write: what it deletes, that transaction writes. Locked in the order of their
-- ids, so that two releases of the same readings wait for each other instead of deadlocking; who comes second finds
-- the rows gone.
WITH locked AS (
    SELECT tenant_id, quarantine_id FROM quarantine
     WHERE tenant_id = %(tenant)s AND quarantine_id = ANY (%(ids)s)
     ORDER BY quarantine_id
       FOR UPDATE
)
DELETE FROM quarantine q USING locked l
 WHERE q.tenant_id = l.tenant_id AND q.quarantine_id = l.quarantine_id
RETURNING q.quarantine_id
