-- Of what was dropped before, retired ranges tell. Rows that were deleted one by one, under a retention that was
-- shorter than a neighbour's and has been raised since, left no trace: where that happened, an operator sets kept_from
-- (docs/operations.md).
--
-- After the triggers, so that nothing is retired unnoticed in between; what they have noted since stays. And a step of
-- its own, for it writes every tenant: while it does, others read them.
UPDATE tenants t SET kept_from = greatest(t.kept_from, g.ts_to)
  FROM (SELECT k.tenant_id, r.ts_to
          FROM (SELECT tenant_from, tenant_to, max(ts_to) AS ts_to FROM history_partitions
                 WHERE retired_at IS NOT NULL GROUP BY tenant_from, tenant_to) r
          JOIN tenants k ON k.tenant_id >= r.tenant_from AND k.tenant_id < r.tenant_to AND k.kept_from < r.ts_to
         ORDER BY k.tenant_id FOR NO KEY UPDATE OF k) g
 WHERE t.tenant_id = g.tenant_id;
