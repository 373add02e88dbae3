-- Questions to the warehouse, in SQL that DuckDB, Redshift and PostgreSQL share: no row comparison, no array parameter,
-- no FILTER, no QUALIFY. Parameters are %s, in the order in which they stand. In braces: lists of %s as long as their
-- parameters, directions, and names of the program's own; nothing that a caller wrote.

-- name: names
-- What the warehouse calls the tenant, its devices and its attributes. Two devices can bear one name: one that was
-- deleted, and the one that was registered after it.
SELECT 't' AS kind, name AS name, CAST(tenant_id AS BIGINT) AS id, '' AS type FROM tenants WHERE name = %s
UNION ALL
SELECT 'e', e.external_id, e.entity_id, ''
  FROM entities e JOIN tenants t ON t.tenant_id = e.tenant_id
 WHERE t.name = %s AND e.external_id IN ({entities})
UNION ALL
SELECT 'a', a.name, CAST(a.attribute_id AS BIGINT), a.type
  FROM attributes a JOIN tenants t ON t.tenant_id = a.tenant_id
 WHERE t.name = %s AND a.name IN ({attributes})

-- name: series_branch
-- Readings of one value type.
SELECT entity_id, attribute_id, ts, {values}, revision
  FROM {table}
 WHERE tenant_id = %s AND entity_id IN ({entities}) AND attribute_id IN ({attributes}) AND ts >= %s AND ts < %s

-- name: series_placed
-- The place of each reading in what is left of its series, for a limit per series. Counted behind the last page's end:
-- of a range that is split, that page may have held readings of this series that are not in this part.
SELECT r.*, row_number() OVER (PARTITION BY entity_id, attribute_id ORDER BY ts {direction}) AS place
  FROM ({branches}) r
 WHERE {after}

-- name: series_within
-- Readings within the limit; the series in which the last page ended has had some of its own.
place <= CASE WHEN entity_id = {entity} AND attribute_id = {attribute} THEN {left} ELSE {limit} END

-- name: series_page
SELECT entity_id, attribute_id, ts, {columns}, revision
  FROM ({rows}) r
 WHERE {after} AND {within}
 ORDER BY entity_id {direction}, attribute_id {direction}, ts {direction}
 LIMIT %s

-- name: series_after
-- What follows a reading in the order of the page.
(entity_id {follows} %s OR (entity_id = %s AND (attribute_id {follows} %s OR (attribute_id = %s AND ts {follows} %s))))

-- name: aggregate_branch
-- Readings of one value type, with their time in microseconds where buckets are asked for.
SELECT entity_id, attribute_id, ts, {us} AS us, {value} AS value
  FROM {table}
 WHERE tenant_id = %s AND {entities} AND attribute_id IN ({attributes}) AND ts >= %s AND ts < %s

-- name: oldest_reading
-- Where the readings of a range begin, for buckets of a range that begins long before.
SELECT min({us}) FROM ({branches}) r

-- name: aggregate_place
-- FIRST and LAST by their places, where a dialect has no aggregate for the value at the smallest timestamp.
, row_number() OVER ({partition} ORDER BY ts {direction}, entity_id {direction}, attribute_id {direction}) AS {place}

-- name: aggregate
SELECT in_bucket, of_entity, of_attribute, {results}
  FROM (SELECT k.*{places}
          FROM (SELECT {bucket} AS in_bucket, {entity} AS of_entity, {attribute} AS of_attribute,
                       entity_id, attribute_id, ts, value
                  FROM ({branches}) r) k) p
 GROUP BY in_bucket, of_entity, of_attribute
 LIMIT %s

-- name: aggregate_within_text
-- As many rows of an answer as texts are wanted of, and the one that passes that: the rest would only fill memory.
SELECT {columns}
  FROM (SELECT a.*, sum({length}) OVER (ORDER BY {keys} ROWS UNBOUNDED PRECEDING) AS so_far FROM ({answer}) a) b
 WHERE so_far - ({length}) <= {most}

-- name: device_names
SELECT entity_id, external_id FROM entities WHERE tenant_id = %s AND {entities}
