-- The audit of the stores against each other.

-- name: tenants
-- Every tenant, or the one named.
SELECT tenant_id, name FROM tenants WHERE %(name)s::text IS NULL OR name = %(name)s ORDER BY tenant_id

-- name: now
-- The primary's clock, which completeness is measured on.
SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint

-- name: floor
-- From here on a tenant's history is whole. What is older may be here, or gone, or half gone.
SELECT (extract(epoch FROM greatest(now() - t.retention, t.kept_from)) * 1000000)::bigint
  FROM tenants t WHERE t.tenant_id = %(tenant)s

-- name: readings
-- The readings of a tenant in one typed table and a range of reading time.
SELECT entity_id, attribute_id, (extract(epoch FROM ts) * 1000000)::bigint, value, coalesce(revision, 0)
  FROM entity_attributes_{type}
 WHERE tenant_id = %(tenant)s AND ts >= %(from)s AND ts < %(to)s

-- name: deletions
-- Devices of a tenant whose deletion has ended (kept for 30 days), or has not.
SELECT entity_id, external_id FROM entity_deletions
 WHERE tenant_id = %(tenant)s AND (ended_at IS NOT NULL) = %(ended)s ORDER BY entity_id

-- name: remains
-- What is left of devices whose deletion has ended, by table.
SELECT tenant, entity_id, external_id, place, found FROM deletion_remains(%(name)s) ORDER BY 1, 2, 4

-- name: names
-- The devices of a tenant.
SELECT entity_id, external_id FROM entities WHERE tenant_id = %(tenant)s
