-- Statements of storage/administration.py: what operators do with tenants, devices and attributes.

-- name: tenants
-- Counts are the registry's, not history's: those would read everything.
SELECT t.tenant_id, t.name, t.tenant_id >= 1 << 30 AS dedicated, t.retention, t.window_past, t.window_future,
       t.outside_window, t.attribute_quota, t.register_entities, t.register_attributes, t.created_at,
       (SELECT count(*) FROM entities e WHERE e.tenant_id = t.tenant_id),
       (SELECT count(*) FROM attributes a WHERE a.tenant_id = t.tenant_id),
       (SELECT count(*) FROM quarantine q WHERE q.tenant_id = t.tenant_id),
       (SELECT count(*) FROM history_partitions h
         WHERE h.tenant_from = s.tenant_from AND h.retired_at IS NULL),
       (SELECT max(h.ts_to) FROM history_partitions h
         WHERE h.tenant_from = s.tenant_from AND h.retired_at IS NOT NULL),
       nullif(t.kept_from, '-infinity')
  FROM tenants t CROSS JOIN LATERAL tenant_slot(t.tenant_id) s
 WHERE %(name)s::text IS NULL OR t.name = %(name)s
 ORDER BY t.name

-- name: tenant_id
SELECT tenant_id FROM tenants WHERE name = %s

-- name: register_tenant
SELECT register_tenant(%s, %s)

-- name: set_tenant
-- NULL leaves a setting as it is.
UPDATE tenants
   SET retention = coalesce(%(retention)s, retention),
       window_past = coalesce(%(window_past)s, window_past),
       window_future = coalesce(%(window_future)s, window_future),
       outside_window = coalesce(%(outside_window)s, outside_window),
       attribute_quota = coalesce(%(attribute_quota)s, attribute_quota),
       register_entities = coalesce(%(register_entities)s, register_entities),
       register_attributes = coalesce(%(register_attributes)s, register_attributes)
 WHERE name = %(name)s
RETURNING tenant_id

-- name: entity_id
SELECT entity_id FROM entities WHERE tenant_id = %s AND external_id = %s

-- name: register_entity
SELECT register_entity(%s, %s, %s, %s, true)

-- name: devices
SELECT entity_id, external_id, entity_type, labels, created_at
  FROM entities
 WHERE tenant_id = %(tenant)s AND external_id > %(after)s
   AND (%(type)s::text IS NULL OR entity_type = %(type)s)
 ORDER BY external_id
 LIMIT %(limit)s

-- name: register_attribute
SELECT attribute_id, type::text, refusal
  FROM register_attributes(%s, ARRAY[%s]::text[], ARRAY[%s]::attribute_type[], ARRAY[%s]::text[], true)

-- name: attribute
SELECT attribute_id, type::text, keeps_latest FROM attributes WHERE tenant_id = %s AND name = %s

-- name: attributes
SELECT attribute_id, name, type::text, unit, keeps_latest, created_at
  FROM attributes
 WHERE tenant_id = %s
 ORDER BY name

-- name: set_keeps_latest
UPDATE attributes SET keeps_latest = %s WHERE tenant_id = %s AND attribute_id = %s

-- name: set_unit
UPDATE attributes SET unit = %s WHERE tenant_id = %s AND attribute_id = %s

-- name: delete_latest_of_attribute
-- In pieces, and never waiting for a gateway's row lock: gateways lock these rows in the order of their key.
DELETE FROM latest_values l USING (
    SELECT tenant_id, entity_id, attribute_id FROM latest_values
     WHERE tenant_id = %s AND attribute_id = %s
     LIMIT %s FOR UPDATE SKIP LOCKED) d
 WHERE (l.tenant_id, l.entity_id, l.attribute_id) = (d.tenant_id, d.entity_id, d.attribute_id)

-- name: quarantined
SELECT q.quarantine_id, e.external_id, a.name, q.ts,
       coalesce(to_jsonb(q.double_value), to_jsonb(q.bigint_value), to_jsonb(q.boolean_value), to_jsonb(q.text_value)),
       q.reason, q.received_at
  FROM quarantine q
  LEFT JOIN entities e USING (tenant_id, entity_id)
  LEFT JOIN attributes a USING (tenant_id, attribute_id)
 WHERE q.tenant_id = %(tenant)s AND q.quarantine_id > %(after)s
 ORDER BY q.quarantine_id
 LIMIT %(limit)s

-- name: discard_quarantined
DELETE FROM quarantine q
 USING (SELECT tenant_id, quarantine_id FROM quarantine
         WHERE tenant_id = %(tenant)s AND quarantine_id > %(after)s
           AND (%(ids)s::bigint[] IS NULL OR quarantine_id = ANY (%(ids)s::bigint[]))
           AND received_at < %(before)s
         ORDER BY quarantine_id LIMIT %(limit)s) d
 WHERE (q.tenant_id, q.quarantine_id) = (d.tenant_id, d.quarantine_id)
RETURNING q.quarantine_id

-- name: now
-- The clock that received_at was taken from.
SELECT now()
