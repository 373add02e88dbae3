-- The audit of the stores against each other.

-- name: tenants
-- Every tenant, or the one named.
SELECT tenant_id, name FROM tenants WHERE %(name)s::text IS NULL OR name = %(name)s ORDER BY tenant_id

-- name: now
-- The primary's clock, which completeness is measured on.
SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint

-- name: span
-- The reading times that a tenant has in one typed table.
SELECT (extract(epoch FROM min(ts)) * 1000000)::bigint, (extract(epoch FROM max(ts)) * 1000000)::bigint
  FROM entity_attributes_{type}
 WHERE tenant_id = %(tenant)s

-- name: readings
-- The readings of a tenant in one typed table and a range of reading time.
SELECT entity_id, attribute_id, (extract(epoch FROM ts) * 1000000)::bigint, value, coalesce(revision, 0)
  FROM entity_attributes_{type}
 WHERE tenant_id = %(tenant)s AND ts >= %(from)s AND ts < %(to)s
