-- Example queries for psql. Run them all, or copy one:
--
--     psql -v tenant=acme -v device=pump-1 -v attribute=temperature -v other=pressure -f examples.sql DSN
--
-- As the owner, who sees every tenant's tables; members of atlasco_query read the views of the same names in the schema
-- tenant_data, which show the tenant that set_config('atlasco.tenant_id', …) names.

\set ON_ERROR_STOP on

-- Everything leads with the tenant's id: it prunes to the tenant's partitions. Numbers are looked up once, into psql
-- variables, for only constants let the planner leave partitions out.
SELECT tenant_id FROM tenants WHERE name = :'tenant' \gset
SELECT entity_id FROM entities WHERE tenant_id = :tenant_id AND external_id = :'device' \gset
SELECT attribute_id FROM attributes WHERE tenant_id = :tenant_id AND name = :'attribute' \gset
SELECT attribute_id AS other_id FROM attributes WHERE tenant_id = :tenant_id AND name = :'other' \gset

\echo '-- latest: the newest value of every attribute of a device'
SELECT a.name, l.ts, coalesce(to_jsonb(l.double_value), to_jsonb(l.bigint_value), to_jsonb(l.boolean_value),
                              to_jsonb(l.text_value)) AS value, a.unit
  FROM latest_values l JOIN attributes a ON a.tenant_id = l.tenant_id AND a.attribute_id = l.attribute_id
 WHERE l.tenant_id = :tenant_id AND l.entity_id = :entity_id
 ORDER BY a.name;

\echo '-- search: devices by the latest values of two attributes, type and label'
SELECT e.external_id, e.entity_type, one.double_value AS attribute, two.double_value AS other
  FROM entities e
  JOIN latest_values one ON one.tenant_id = :tenant_id AND one.entity_id = e.entity_id
                        AND one.attribute_id = :attribute_id
  JOIN latest_values two ON two.tenant_id = :tenant_id AND two.entity_id = e.entity_id AND two.attribute_id = :other_id
 WHERE e.tenant_id = :tenant_id AND one.double_value > 80 AND two.double_value < 3
 ORDER BY e.external_id
 LIMIT 100;

\echo '-- series: the readings of one attribute of a device in the last day'
SELECT ts, value, coalesce(revision, 0) AS times_corrected
  FROM entity_attributes_double
 WHERE tenant_id = :tenant_id AND entity_id = :entity_id AND attribute_id = :attribute_id
   AND ts >= now() - interval '1 day' AND ts < now()
 ORDER BY ts
 LIMIT 1000;

\echo '-- mixed: every reading of a device in the last hour, whatever its type'
SELECT a.name, v.ts, v.type, v.double_value, v.bigint_value, v.boolean_value, v.text_value
  FROM entity_attributes v JOIN attributes a ON a.tenant_id = v.tenant_id AND a.attribute_id = v.attribute_id
 WHERE v.tenant_id = :tenant_id AND v.entity_id = :entity_id AND v.ts >= now() - interval '1 hour' AND v.ts < now()
 ORDER BY v.ts, a.name
 LIMIT 1000;

\echo '-- buckets: an hour each, in local time, computed from the readings'
SELECT date_trunc('hour', ts, 'Europe/Berlin') AS hour, count(*), min(value), max(value), avg(value)
  FROM entity_attributes_double
 WHERE tenant_id = :tenant_id AND entity_id = :entity_id AND attribute_id = :attribute_id
   AND ts >= now() - interval '7 days' AND ts < now()
 GROUP BY 1
 ORDER BY 1;

\echo '-- rollup: the same from buckets computed ahead (declare them with `atlasco rollup create`)'
SELECT bucket AS hour, readings, minimum, maximum, total / readings AS mean,
       CASE WHEN readings > 1 THEN sqrt(deviation / (readings - 1)) END AS stddev, first_value, last_value
  FROM rollup_hour_double
 WHERE tenant_id = :tenant_id AND entity_id = :entity_id AND attribute_id = :attribute_id
   AND bucket >= date_trunc('hour', now() - interval '7 days', 'UTC')
 ORDER BY bucket;

\echo '-- freshness: up to when rollups and projections are complete'
SELECT min(published_through) AS complete_through FROM outbox_consumers WHERE consumer = 'rollup';

\echo '-- pruning: of all partitions, only those of the tenant and of the range are in the plan'
EXPLAIN (COSTS off)
SELECT ts, value
  FROM entity_attributes_double
 WHERE tenant_id = :tenant_id AND entity_id = :entity_id AND attribute_id = :attribute_id
   AND ts >= date_trunc('day', now(), 'UTC') - interval '1 day' AND ts < date_trunc('day', now(), 'UTC');
