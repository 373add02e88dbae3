-- The Redshift warehouse, in SQL that Redshift has. Parameters are %s; names in braces are filled in by the program from
-- its own list of tables. Everything is in the schema atlasco, first on the search path of our sessions.

-- name: create_schema
CREATE SCHEMA IF NOT EXISTS atlasco

-- name: create_lock
-- Locked by every load before anything else, and read by nobody: loads wait for each other, queries for none. A load
-- that began its snapshot only after it got the lock cannot run into a serializable isolation violation (1023).
CREATE TABLE IF NOT EXISTS atlasco.load_lock (nothing INTEGER)

-- name: create_generation
CREATE TABLE IF NOT EXISTS atlasco.generation (generation INTEGER NOT NULL, rebuilding INTEGER)

-- name: create_load_state
CREATE TABLE IF NOT EXISTS atlasco.load_state (
    partition INTEGER NOT NULL, topic_id VARCHAR(64) NOT NULL, next_offset BIGINT NOT NULL,
    halted VARCHAR(1000) NOT NULL, snapshot VARCHAR(65535), snapshot_through_us BIGINT)

-- name: create_rebuild_floors
CREATE TABLE IF NOT EXISTS atlasco.rebuild_floors (tenant_id INTEGER NOT NULL, floor_us BIGINT NOT NULL)

-- name: create_batches
CREATE TABLE IF NOT EXISTS atlasco.batches (
    batch_id VARCHAR(32) NOT NULL, tenant_id INTEGER NOT NULL, bucket INTEGER NOT NULL, deletes BOOLEAN NOT NULL,
    part INTEGER NOT NULL, loaded_us BIGINT NOT NULL)
DISTKEY (batch_id) SORTKEY (loaded_us)

-- name: create_watermarks
CREATE TABLE IF NOT EXISTS atlasco.watermarks (
    lane INTEGER NOT NULL, partition INTEGER NOT NULL, lanes INTEGER NOT NULL, partitions INTEGER NOT NULL,
    complete_through_us BIGINT NOT NULL, lease_epoch BIGINT NOT NULL)

-- name: create_dead_letters
CREATE TABLE IF NOT EXISTS atlasco.dead_letters (
    topic_id VARCHAR(64) NOT NULL, partition INTEGER NOT NULL, record_offset BIGINT NOT NULL,
    reason VARCHAR(2000) NOT NULL, affects_readings BOOLEAN NOT NULL, tenant_id INTEGER, bucket INTEGER,
    min_ts_us BIGINT, max_ts_us BIGINT)

-- name: create_complete_from
CREATE TABLE IF NOT EXISTS atlasco.complete_from (tenant_id INTEGER NOT NULL, from_us BIGINT NOT NULL)

-- name: create_base
-- By device, so that a device's history is in one place; sorted by time, so that what is loaded next is appended to the
-- sorted region and a range of time reads few blocks.
CREATE TABLE IF NOT EXISTS atlasco.base_{type} (
    tenant_id INTEGER NOT NULL, entity_id BIGINT NOT NULL, attribute_id INTEGER NOT NULL, ts TIMESTAMP NOT NULL,
    value {sql}, revision INTEGER NOT NULL)
DISTKEY (entity_id) SORTKEY (ts)

-- name: create_delta
CREATE TABLE IF NOT EXISTS atlasco.delta_{type} (
    tenant_id INTEGER NOT NULL, entity_id BIGINT NOT NULL, attribute_id INTEGER NOT NULL, ts TIMESTAMP NOT NULL,
    value {sql}, revision INTEGER NOT NULL, deleted BOOLEAN NOT NULL)
DISTKEY (entity_id) SORTKEY (ts)

-- name: create_gone_entities
-- The devices that were deleted, so that no batch delivered late or again brings a name back. The audit reads it as it is.
CREATE TABLE IF NOT EXISTS atlasco.gone_entities (tenant_id INTEGER NOT NULL, entity_id BIGINT NOT NULL)
DISTKEY (entity_id) SORTKEY (tenant_id, entity_id)

-- name: create_entities
CREATE TABLE IF NOT EXISTS atlasco.entities (
    tenant_id INTEGER NOT NULL, entity_id BIGINT NOT NULL, external_id VARCHAR(512) NOT NULL)
DISTKEY (entity_id) SORTKEY (tenant_id, external_id)

-- name: create_attributes
CREATE TABLE IF NOT EXISTS atlasco.attributes (
    tenant_id INTEGER NOT NULL, attribute_id INTEGER NOT NULL, name VARCHAR(512) NOT NULL, type VARCHAR(16) NOT NULL)
DISTSTYLE ALL SORTKEY (tenant_id, name)

-- name: create_tenants
CREATE TABLE IF NOT EXISTS atlasco.tenants (tenant_id INTEGER NOT NULL, name VARCHAR(512) NOT NULL)
DISTSTYLE ALL SORTKEY (tenant_id)

-- name: create_resolved
-- All readings that are there. Base rows that no delta row names are passed through; of the others, and the delta's,
-- the highest revision counts, and of a value and a deletion of the same revision the deletion.
CREATE OR REPLACE VIEW atlasco.resolved_{type} AS
SELECT b.tenant_id, b.entity_id, b.attribute_id, b.ts, b.value, b.revision
  FROM atlasco.base_{type} b
 WHERE NOT EXISTS (SELECT 1 FROM atlasco.delta_{type} d WHERE d.tenant_id = b.tenant_id
                    AND d.entity_id = b.entity_id AND d.attribute_id = b.attribute_id AND d.ts = b.ts)
UNION ALL
SELECT r.tenant_id, r.entity_id, r.attribute_id, r.ts, r.value, r.revision
  FROM (SELECT a.tenant_id, a.entity_id, a.attribute_id, a.ts, a.value, a.revision, a.gone,
               row_number() OVER (PARTITION BY a.tenant_id, a.entity_id, a.attribute_id, a.ts
                                  ORDER BY a.revision DESC, a.gone DESC) AS place
          FROM (SELECT b.tenant_id, b.entity_id, b.attribute_id, b.ts, b.value, b.revision, 0 AS gone
                  FROM atlasco.base_{type} b
                 WHERE EXISTS (SELECT 1 FROM atlasco.delta_{type} d WHERE d.tenant_id = b.tenant_id
                                AND d.entity_id = b.entity_id AND d.attribute_id = b.attribute_id AND d.ts = b.ts)
                UNION ALL
                SELECT d.tenant_id, d.entity_id, d.attribute_id, d.ts, d.value, d.revision,
                       CASE WHEN d.deleted THEN 1 ELSE 0 END AS gone
                  FROM atlasco.delta_{type} d) a) r
 WHERE r.place = 1 AND r.gone = 0

-- name: create_readings
-- The relation everybody queries. A device is gone before its readings are: those are deleted one by one, and may be
-- many.
CREATE OR REPLACE VIEW atlasco.entity_attributes_{type} AS
SELECT r.tenant_id, r.entity_id, r.attribute_id, r.ts, r.value, r.revision
  FROM atlasco.resolved_{type} r
 WHERE NOT EXISTS (SELECT 1 FROM atlasco.gone_entities g WHERE g.tenant_id = r.tenant_id AND g.entity_id = r.entity_id)

-- name: create_entity_attributes
CREATE OR REPLACE VIEW atlasco.entity_attributes AS
SELECT tenant_id, entity_id, attribute_id, ts, CAST('double' AS VARCHAR(16)) AS type, value AS double_value,
       CAST(NULL AS BIGINT) AS bigint_value, CAST(NULL AS BOOLEAN) AS boolean_value,
       CAST(NULL AS VARCHAR(65535)) AS text_value, revision
  FROM atlasco.entity_attributes_double
UNION ALL
SELECT tenant_id, entity_id, attribute_id, ts, CAST('bigint' AS VARCHAR(16)), CAST(NULL AS DOUBLE PRECISION), value,
       CAST(NULL AS BOOLEAN), CAST(NULL AS VARCHAR(65535)), revision
  FROM atlasco.entity_attributes_bigint
UNION ALL
SELECT tenant_id, entity_id, attribute_id, ts, CAST('boolean' AS VARCHAR(16)), CAST(NULL AS DOUBLE PRECISION),
       CAST(NULL AS BIGINT), value, CAST(NULL AS VARCHAR(65535)), revision
  FROM atlasco.entity_attributes_boolean
UNION ALL
SELECT tenant_id, entity_id, attribute_id, ts, CAST('text' AS VARCHAR(16)), CAST(NULL AS DOUBLE PRECISION),
       CAST(NULL AS BIGINT), CAST(NULL AS BOOLEAN), value, revision
  FROM atlasco.entity_attributes_text

-- name: first_generation
INSERT INTO atlasco.generation (generation, rebuilding)
SELECT 1, NULL WHERE NOT EXISTS (SELECT 1 FROM atlasco.generation)

-- name: lock
LOCK TABLE atlasco.load_lock

-- name: generation
SELECT generation, rebuilding FROM atlasco.generation

-- name: set_generation
UPDATE atlasco.generation SET generation = %s, rebuilding = %s

-- name: states
SELECT partition, topic_id, next_offset, halted, snapshot, snapshot_through_us FROM atlasco.load_state
 ORDER BY partition

-- name: rebuild_floors
SELECT tenant_id, floor_us FROM atlasco.rebuild_floors

-- name: add_state
INSERT INTO atlasco.load_state (partition, topic_id, next_offset, halted, snapshot, snapshot_through_us)
VALUES (%s, %s, %s, '', %s, %s)

-- name: halt
UPDATE atlasco.load_state SET halted = %s WHERE partition = %s AND halted = ''

-- name: advance
UPDATE atlasco.load_state SET next_offset = %s WHERE partition = %s

-- name: forget_snapshot
UPDATE atlasco.load_state SET snapshot = NULL, snapshot_through_us = NULL WHERE partition = %s

-- name: stage_batches
CREATE TEMP TABLE staged_batches (
    batch_id VARCHAR(32), tenant_id INTEGER, bucket INTEGER, deletes BOOLEAN, part INTEGER, loaded_us BIGINT)

-- name: known_batches
SELECT s.batch_id, s.tenant_id, s.bucket, s.deletes, s.part FROM staged_batches s
  JOIN atlasco.batches b ON b.batch_id = s.batch_id AND b.tenant_id = s.tenant_id AND b.bucket = s.bucket
       AND b.deletes = s.deletes AND b.part = s.part

-- name: add_batches
INSERT INTO atlasco.batches (batch_id, tenant_id, bucket, deletes, part, loaded_us)
SELECT batch_id, tenant_id, bucket, deletes, part, loaded_us FROM staged_batches

-- name: drop_staged_batches
DROP TABLE staged_batches

-- name: forget_batches
DELETE FROM atlasco.batches WHERE loaded_us < %s

-- name: stage_gone_entities
CREATE TEMP TABLE staged_gone_entities (tenant_id INTEGER, entity_id BIGINT)

-- name: merge_gone_entities
INSERT INTO atlasco.gone_entities (tenant_id, entity_id)
SELECT DISTINCT s.tenant_id, s.entity_id FROM staged_gone_entities s
 WHERE NOT EXISTS (SELECT 1 FROM atlasco.gone_entities g WHERE g.tenant_id = s.tenant_id AND g.entity_id = s.entity_id)

-- name: remove_gone
-- The one place where a name is stored: what the view of a local warehouse leaves out is deleted here at once.
DELETE FROM atlasco.entities
 USING atlasco.gone_entities g
 WHERE g.tenant_id = entities.tenant_id AND g.entity_id = entities.entity_id

-- name: not_gone
-- After a rebuild: PostgreSQL has the device, for it was restored to a moment before the deletion.
DELETE FROM atlasco.gone_entities
 USING atlasco.entities e
 WHERE e.tenant_id = gone_entities.tenant_id AND e.entity_id = gone_entities.entity_id

-- name: stage_entities
CREATE TEMP TABLE staged_entities (tenant_id INTEGER, entity_id BIGINT, external_id VARCHAR(512))

-- name: merge_entities
INSERT INTO atlasco.entities (tenant_id, entity_id, external_id)
SELECT s.tenant_id, s.entity_id, max(s.external_id) FROM staged_entities s
 WHERE NOT EXISTS (SELECT 1 FROM atlasco.entities e WHERE e.tenant_id = s.tenant_id AND e.entity_id = s.entity_id)
   AND NOT EXISTS (SELECT 1 FROM atlasco.gone_entities g WHERE g.tenant_id = s.tenant_id AND g.entity_id = s.entity_id)
 GROUP BY s.tenant_id, s.entity_id

-- name: stage_attributes
CREATE TEMP TABLE staged_attributes (
    tenant_id INTEGER, attribute_id INTEGER, name VARCHAR(512), type VARCHAR(16))

-- name: merge_attributes
INSERT INTO atlasco.attributes (tenant_id, attribute_id, name, type)
SELECT s.tenant_id, s.attribute_id, max(s.name), max(s.type) FROM staged_attributes s
 WHERE NOT EXISTS (SELECT 1 FROM atlasco.attributes a
                    WHERE a.tenant_id = s.tenant_id AND a.attribute_id = s.attribute_id)
 GROUP BY s.tenant_id, s.attribute_id

-- name: stage_tenants
CREATE TEMP TABLE staged_tenants (tenant_id INTEGER, name VARCHAR(512))

-- name: merge_tenants
INSERT INTO atlasco.tenants (tenant_id, name)
SELECT s.tenant_id, max(s.name) FROM staged_tenants s
 WHERE NOT EXISTS (SELECT 1 FROM atlasco.tenants t WHERE t.tenant_id = s.tenant_id)
 GROUP BY s.tenant_id

-- name: drop_staged
DROP TABLE staged_{kind}

-- name: copy
-- The manifest names every file with its length, all mandatory: a file that is missing or torn fails the load.
COPY {table} FROM '{manifest}' IAM_ROLE {role} FORMAT AS PARQUET MANIFEST

-- name: watermarks
SELECT lane, partition, lanes, partitions, complete_through_us, lease_epoch FROM atlasco.watermarks

-- name: remove_watermark
DELETE FROM atlasco.watermarks WHERE lane = %s AND partition = %s

-- name: remove_watermarks
DELETE FROM atlasco.watermarks

-- name: add_watermark
INSERT INTO atlasco.watermarks (lane, partition, lanes, partitions, complete_through_us, lease_epoch)
VALUES (%s, %s, %s, %s, %s, %s)

-- name: add_dead_letter
INSERT INTO atlasco.dead_letters
       (topic_id, partition, record_offset, reason, affects_readings, tenant_id, bucket, min_ts_us, max_ts_us)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)

-- name: dead_letters
SELECT partition, record_offset, reason, affects_readings, tenant_id, bucket, min_ts_us, max_ts_us
  FROM atlasco.dead_letters ORDER BY partition, record_offset

-- name: find_dead_letter
SELECT count(*) FROM atlasco.dead_letters WHERE partition = %s AND record_offset = %s

-- name: remove_dead_letter
DELETE FROM atlasco.dead_letters WHERE partition = %s AND record_offset = %s

-- name: remove_dead_letters
DELETE FROM atlasco.dead_letters

-- name: complete_from
SELECT tenant_id, from_us FROM atlasco.complete_from

-- name: remove_complete_from
DELETE FROM atlasco.complete_from WHERE tenant_id = %s

-- name: add_complete_from
INSERT INTO atlasco.complete_from (tenant_id, from_us) VALUES (%s, %s)

-- name: size
SELECT count(*) FROM atlasco.{kind}

-- name: expire
DELETE FROM atlasco.{kind} WHERE ts < %s

-- name: expire_tenant
DELETE FROM atlasco.{kind} WHERE ts < %s AND tenant_id = %s

-- name: best_of_delta
-- Of each reading that the base has, the delta row that counts, if it beats the base's.
CREATE TEMP TABLE folded AS
SELECT d.tenant_id, d.entity_id, d.attribute_id, d.ts, d.value, d.revision, d.deleted, b.revision AS base_revision
  FROM (SELECT tenant_id, entity_id, attribute_id, ts, value, revision, deleted,
               row_number() OVER (PARTITION BY tenant_id, entity_id, attribute_id, ts
                                  ORDER BY revision DESC, CASE WHEN deleted THEN 1 ELSE 0 END DESC) AS place
          FROM atlasco.delta_{type}) d
  JOIN atlasco.base_{type} b ON b.tenant_id = d.tenant_id AND b.entity_id = d.entity_id
       AND b.attribute_id = d.attribute_id AND b.ts = d.ts
 WHERE d.place = 1

-- name: fold_away
DELETE FROM atlasco.base_{type}
 USING folded f
 WHERE f.tenant_id = base_{type}.tenant_id AND f.entity_id = base_{type}.entity_id
   AND f.attribute_id = base_{type}.attribute_id AND f.ts = base_{type}.ts
   AND (f.revision > base_{type}.revision OR (f.deleted AND f.revision = base_{type}.revision))

-- name: fold_in
INSERT INTO atlasco.base_{type} (tenant_id, entity_id, attribute_id, ts, value, revision)
SELECT tenant_id, entity_id, attribute_id, ts, value, revision FROM folded WHERE NOT deleted AND revision > base_revision

-- name: fold_out
-- Deletions stay: an older correction may still arrive and must lose to them.
DELETE FROM atlasco.delta_{type}
 USING folded f
 WHERE f.tenant_id = delta_{type}.tenant_id AND f.entity_id = delta_{type}.entity_id
   AND f.attribute_id = delta_{type}.attribute_id AND f.ts = delta_{type}.ts
   AND NOT (delta_{type}.deleted AND delta_{type}.revision = f.revision)

-- name: drop_folded
DROP TABLE folded

-- name: reset_states
DELETE FROM atlasco.load_state

-- name: reset_floors
DELETE FROM atlasco.rebuild_floors

-- name: add_floor
INSERT INTO atlasco.rebuild_floors (tenant_id, floor_us) VALUES (%s, %s)

-- name: replace_from_floor
-- Floors as timestamps: the comparison then needs no function over ts.
DELETE FROM atlasco.{kind}
 USING floor_times f
 WHERE f.tenant_id = {kind}.tenant_id AND {kind}.ts >= f.floor_ts

-- name: replace_tenants_gone
DELETE FROM atlasco.{kind} WHERE tenant_id NOT IN (SELECT tenant_id FROM floor_times)

-- name: floor_times
CREATE TEMP TABLE floor_times (tenant_id INTEGER, floor_ts TIMESTAMP)

-- name: add_floor_time
INSERT INTO floor_times (tenant_id, floor_ts) VALUES (%s, %s)

-- name: drop_floor_times
DROP TABLE floor_times

-- name: reset_names
DELETE FROM atlasco.{kind}

-- name: own_process
SELECT pg_backend_pid()

-- name: cancel
-- Ends the statement that another session of ours runs.
SELECT pg_cancel_backend(%s)

-- name: terminate
-- Ends the session.
SELECT pg_terminate_backend(%s)
