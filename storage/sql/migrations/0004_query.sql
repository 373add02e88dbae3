-- Pre-calculated combinations: time rollups and wide projections, declared per tenant, kept by a worker of its own
-- outside the ingest transaction; and the deletion of devices, which the same worker carries out.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'atlasco_rollup') THEN
        CREATE ROLE atlasco_rollup NOLOGIN;
    END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL;
END $$;

-- Who else follows the outbox, and how far they are in each lane; the columns mean what they mean in relay_lanes.
-- retire_outbox() drops no batch that one of them has not passed. A consumer that is given up must be deleted here.
CREATE TABLE outbox_consumers (
    consumer          text        NOT NULL,
    lane              smallint    NOT NULL,
    epoch             bigint      NOT NULL DEFAULT 0,
    published         pg_snapshot NOT NULL DEFAULT '3:3:',
    published_through timestamptz,
    target            pg_snapshot,
    target_at         timestamptz,
    sent_xid          xid8,
    sent_id           bigint,
    server            text,
    timeline          text,
    updated_at        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, lane),
    CHECK ((target IS NULL) = (target_at IS NULL)),
    CHECK ((sent_xid IS NULL) = (sent_id IS NULL))
) WITH (fillfactor = 50);

-- Time buckets of 1 minute and 1 hour for some attributes of all devices of a tenant.
CREATE TABLE rollups (
    tenant_id       integer     NOT NULL REFERENCES tenants,
    name            text        NOT NULL CHECK (name ~ '^[a-z][a-z0-9_]{0,62}$'),
    -- Distinct, ascending.
    attribute_ids   integer[]   NOT NULL CHECK (cardinality(attribute_ids) BETWEEN 1 AND 1000),
    -- NULL: as far back as readings are kept.
    backfill_from   timestamptz,
    state           text        NOT NULL DEFAULT 'pending'
                    CHECK (state IN ('pending', 'backfilling', 'serving', 'dropping')),
    -- Buckets from here on are filled; NULL: none yet. The back-fill moves it into the past.
    complete_from   timestamptz,
    -- Of the stretch before complete_from that is being filled, or of the removal: the last device done.
    backfill_entity bigint      NOT NULL DEFAULT 0,
    created_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, name)
);

-- Latest values side by side: one table for each projection, projections.p<projection_id>.
CREATE TABLE projections (
    projection_id   integer     GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id       integer     NOT NULL REFERENCES tenants,
    name            text        NOT NULL CHECK (name ~ '^[a-z][a-z0-9_]{0,62}$'),
    -- Empty: devices of every type.
    entity_type     text        NOT NULL,
    attribute_ids   integer[]   NOT NULL CHECK (cardinality(attribute_ids) BETWEEN 1 AND 64),
    state           text        NOT NULL DEFAULT 'pending'
                    CHECK (state IN ('pending', 'backfilling', 'serving', 'dropping')),
    -- The last device done by the back-fill.
    backfill_entity bigint      NOT NULL DEFAULT 0,
    created_at      timestamptz NOT NULL DEFAULT now(),
    UNIQUE (tenant_id, name)
);
CREATE SCHEMA projections;

-- One row per (device, attribute, bucket) that has readings. deviation is the sum of the squared deviations from the
-- bucket's mean: unlike a sum of squares it loses nothing to cancellation, and buckets can still be merged. total and
-- deviation are NaN where a finite reading is 1e140 or beyond, whose square no double holds.
CREATE TABLE rollup_minute_double (
    tenant_id    integer          NOT NULL,
    attribute_id integer          NOT NULL,
    entity_id    bigint           NOT NULL,
    bucket       timestamptz      NOT NULL,
    readings     bigint           NOT NULL,
    minimum      double precision NOT NULL,
    maximum      double precision NOT NULL,
    total        double precision NOT NULL,
    deviation    double precision NOT NULL,
    first_ts     timestamptz      NOT NULL,
    first_value  double precision NOT NULL,
    last_ts      timestamptz      NOT NULL,
    last_value   double precision NOT NULL,
    PRIMARY KEY (tenant_id, entity_id, attribute_id, bucket)
) PARTITION BY RANGE (bucket);
CREATE TABLE rollup_hour_double (LIKE rollup_minute_double INCLUDING ALL) PARTITION BY RANGE (bucket);

CREATE TABLE rollup_minute_bigint (
    tenant_id    integer          NOT NULL,
    attribute_id integer          NOT NULL,
    entity_id    bigint           NOT NULL,
    bucket       timestamptz      NOT NULL,
    readings     bigint           NOT NULL,
    minimum      bigint           NOT NULL,
    maximum      bigint           NOT NULL,
    total        numeric          NOT NULL,
    deviation    double precision NOT NULL,
    first_ts     timestamptz      NOT NULL,
    first_value  bigint           NOT NULL,
    last_ts      timestamptz      NOT NULL,
    last_value   bigint           NOT NULL,
    PRIMARY KEY (tenant_id, entity_id, attribute_id, bucket)
) PARTITION BY RANGE (bucket);
CREATE TABLE rollup_hour_bigint (LIKE rollup_minute_bigint INCLUDING ALL) PARTITION BY RANGE (bucket);

-- Devices that are being deleted, or were. The device's row in entities goes when this one comes: nobody finds it by
-- name from then on, and until ended_at is set nobody can register under the name.
CREATE TABLE entity_deletions (
    operation_id     uuid        PRIMARY KEY,
    tenant_id        integer     NOT NULL REFERENCES tenants,
    entity_id        bigint      NOT NULL,
    external_id      text        NOT NULL,
    -- 'settle': all is deleted; what a request that was under way may still have written is looked for once more.
    step             text        NOT NULL DEFAULT 'database'
                     CHECK (step IN ('database', 'settle', 'materializations', 'warehouse', 'done')),
    readings_deleted bigint      NOT NULL DEFAULT 0,
    -- What failed last; empty: nothing since.
    problem          text        NOT NULL DEFAULT '',
    created_at       timestamptz NOT NULL DEFAULT now(),
    started_at       timestamptz,
    -- The database's clock after the last reading was deleted.
    deleted_at       timestamptz,
    ended_at         timestamptz
);
CREATE INDEX entity_deletions_open ON entity_deletions (tenant_id, external_id) WHERE ended_at IS NULL;
CREATE INDEX entity_deletions_by_age ON entity_deletions (tenant_id, created_at DESC, operation_id);

-- Makes the monthly rollup partitions that hold [p_from, p_to), as far as they are missing; returns how many months.
CREATE FUNCTION ensure_rollups(p_from timestamptz, p_to timestamptz) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    v_at   timestamptz := date_trunc('month', p_from);
    v_next timestamptz;
    v_name text;
    v_made integer := 0;
BEGIN
    IF p_from < now() - interval '100 years' OR p_to > now() + interval '40 days' THEN
        RAISE EXCEPTION 'rollups are made from 100 years ago to 40 days ahead, not for [%, %)', p_from, p_to
              USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('atlasco.rollup_partitions'));
    WHILE v_at < p_to LOOP
        v_next := v_at + interval '1 month';
        FOREACH v_name IN ARRAY ARRAY['rollup_minute_double', 'rollup_hour_double',
                                      'rollup_minute_bigint', 'rollup_hour_bigint'] LOOP
            CONTINUE WHEN to_regclass(v_name || to_char(v_at, '_YYYYMM')) IS NOT NULL;
            -- The row of the present bucket is written again and again: room for its next version on the page.
            EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING ALL) WITH (fillfactor = 70)',
                           v_name || to_char(v_at, '_YYYYMM'), v_name);
            EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                           v_name, v_name || to_char(v_at, '_YYYYMM'), v_at, v_next);
            v_made := v_made + 1;
        END LOOP;
        v_at := v_next;
    END LOOP;
    RETURN v_made / 4;
END $$;

-- Drops the months of rollups that are past every tenant's retention; returns how many tables went.
CREATE FUNCTION retire_rollups() RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public, pg_temp SET timezone = 'UTC' SET lock_timeout = '100ms' AS $$
DECLARE
    v_leaf text;
    v_gone integer := 0;
BEGIN
    FOR v_leaf IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
         WHERE i.inhparent IN ('rollup_minute_double'::regclass, 'rollup_hour_double'::regclass,
                               'rollup_minute_bigint'::regclass, 'rollup_hour_bigint'::regclass)
           AND to_timestamp(right(c.relname, 6), 'YYYYMM') + interval '1 month'
               < (SELECT now() - max(retention) - interval '1 hour' FROM tenants)
         ORDER BY 1
    LOOP
        EXECUTE format('DROP TABLE %I', v_leaf);
        v_gone := v_gone + 1;
    END LOOP;
    RETURN v_gone;
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
    -- In use: the next run drops them.
    RETURN 0;
END $$;

-- Declares a rollup. 'created', 'same' (it is there), 'exists' (another one has the name), 'quota'.
CREATE FUNCTION create_rollup(p_tenant integer, p_name text, p_attributes integer[], p_backfill_from timestamptz)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_there rollups;
BEGIN
    -- The lock keeps two declarations from each taking the last place.
    PERFORM FROM tenants WHERE tenant_id = p_tenant FOR NO KEY UPDATE;
    SELECT * INTO v_there FROM rollups WHERE tenant_id = p_tenant AND name = p_name;
    IF FOUND THEN
        RETURN CASE WHEN v_there.attribute_ids = p_attributes AND v_there.state <> 'dropping'
                     AND v_there.backfill_from IS NOT DISTINCT FROM p_backfill_from THEN 'same' ELSE 'exists' END;
    ELSIF (SELECT count(*) FROM rollups WHERE tenant_id = p_tenant) >= 16 THEN
        RETURN 'quota';
    END IF;
    INSERT INTO rollups (tenant_id, name, attribute_ids, backfill_from)
    VALUES (p_tenant, p_name, p_attributes, p_backfill_from);
    RETURN 'created';
END $$;

-- Declares a projection and makes its table, which the worker fills. Outcomes as of create_rollup().
CREATE FUNCTION create_projection(p_tenant integer, p_name text, p_type text, p_attributes integer[]) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_there     projections;
    v_attribute record;
    v_columns   text := '';
    v_id        integer;
BEGIN
    PERFORM FROM tenants WHERE tenant_id = p_tenant FOR NO KEY UPDATE;
    SELECT * INTO v_there FROM projections WHERE tenant_id = p_tenant AND name = p_name;
    IF FOUND THEN
        RETURN CASE WHEN v_there.attribute_ids = p_attributes AND v_there.state <> 'dropping'
                     AND v_there.entity_type = p_type THEN 'same' ELSE 'exists' END;
    ELSIF (SELECT count(*) FROM projections WHERE tenant_id = p_tenant) >= 16 THEN
        RETURN 'quota';
    END IF;
    INSERT INTO projections (tenant_id, name, entity_type, attribute_ids)
    VALUES (p_tenant, p_name, p_type, p_attributes)
    RETURNING projection_id INTO v_id;
    FOR v_attribute IN
        SELECT attribute_id AS id, type FROM attributes
         WHERE tenant_id = p_tenant AND attribute_id = ANY (p_attributes) ORDER BY attribute_id
    LOOP
        -- Byte order for texts: what < and > mean must not depend on the server's locale.
        v_columns := v_columns || format(', v%s %s, t%s timestamptz', v_attribute.id,
            CASE v_attribute.type WHEN 'double' THEN 'double precision' WHEN 'text' THEN 'text COLLATE "C"'
                                  ELSE v_attribute.type::text END, v_attribute.id);
    END LOOP;
    EXECUTE format('CREATE TABLE projections.p%s (tenant_id integer NOT NULL, entity_id bigint NOT NULL, '
                   'external_id text NOT NULL, entity_type text NOT NULL, labels jsonb NOT NULL, '
                   'created_at timestamptz NOT NULL%s, PRIMARY KEY (tenant_id, entity_id)) '
                   'WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, '
                   'autovacuum_analyze_scale_factor = 0.05)', v_id, v_columns);
    EXECUTE format('CREATE INDEX ON projections.p%s (tenant_id, external_id)', v_id);
    FOR v_attribute IN
        SELECT attribute_id AS id, type FROM attributes
         WHERE tenant_id = p_tenant AND attribute_id = ANY (p_attributes) ORDER BY attribute_id
    LOOP
        -- An index entry has a bound, a text has not; so texts are found by how they begin.
        EXECUTE format('CREATE INDEX ON projections.p%s (tenant_id, %s)', v_id,
            CASE v_attribute.type WHEN 'text' THEN format('left(v%s, 64)', v_attribute.id)
                                  ELSE 'v' || v_attribute.id END);
    END LOOP;
    EXECUTE format('CREATE VIEW tenant_data.projection_%s AS SELECT * FROM projections.p%s '
                   'WHERE tenant_id = public.visible_tenant()', v_id, v_id);
    EXECUTE format('GRANT SELECT ON tenant_data.projection_%s TO atlasco_query', v_id);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON projections.p%s TO atlasco_rollup', v_id);
    RETURN 'created';
END $$;

-- Takes a rollup or a projection out of use; the worker removes its rows. False: there is none of the name.
CREATE FUNCTION drop_rollup(p_tenant integer, p_name text) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    WITH gone AS (UPDATE rollups SET state = 'dropping', backfill_entity = 0
                   WHERE tenant_id = p_tenant AND name = p_name AND state <> 'dropping' RETURNING 1)
    SELECT EXISTS (SELECT FROM gone)
$$;
CREATE FUNCTION drop_projection(p_tenant integer, p_name text) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    WITH gone AS (UPDATE projections SET state = 'dropping'
                   WHERE tenant_id = p_tenant AND name = p_name AND state <> 'dropping' RETURNING 1)
    SELECT EXISTS (SELECT FROM gone)
$$;

-- The end of a projection that is being dropped. Queries that read it are waited for a moment, no longer.
CREATE FUNCTION remove_projection(p_projection integer) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '100ms' AS $$
BEGIN
    DELETE FROM projections WHERE projection_id = p_projection AND state = 'dropping';
    IF FOUND THEN
        EXECUTE format('DROP VIEW IF EXISTS tenant_data.projection_%s', p_projection);
        EXECUTE format('DROP TABLE IF EXISTS projections.p%s', p_projection);
    END IF;
    RETURN true;
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
    RETURN false;
END $$;

-- Orders the deletion of a device: from the commit on it has no name and no stream. 'created', 'same' (this operation
-- is there), 'conflict' (the operation is of another device), 'unknown'.
CREATE FUNCTION delete_entity(p_tenant integer, p_external_id text, p_operation uuid) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_there  entity_deletions;
    v_entity bigint;
BEGIN
    SELECT * INTO v_there FROM entity_deletions WHERE operation_id = p_operation;
    IF FOUND THEN
        RETURN CASE WHEN v_there.tenant_id = p_tenant AND v_there.external_id = p_external_id
                    THEN 'same' ELSE 'conflict' END;
    END IF;
    DELETE FROM entities WHERE tenant_id = p_tenant AND external_id = p_external_id RETURNING entity_id INTO v_entity;
    IF NOT FOUND THEN
        RETURN 'unknown';
    END IF;
    INSERT INTO entity_deletions (operation_id, tenant_id, entity_id, external_id)
    VALUES (p_operation, p_tenant, v_entity, p_external_id);
    -- The fence: without this row every write of the device's streams is stale. Waits for one that is under way.
    DELETE FROM device_streams WHERE tenant_id = p_tenant AND entity_id = v_entity;
    RETURN 'created';
END $$;

DO $$
DECLARE
    v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY[
        'rollups', 'projections', 'rollup_minute_double', 'rollup_hour_double', 'rollup_minute_bigint',
        'rollup_hour_bigint'
    ] LOOP
        EXECUTE format('CREATE VIEW tenant_data.%I AS '
                       'SELECT * FROM public.%I WHERE tenant_id = public.visible_tenant()', v_table, v_table);
        EXECUTE format('GRANT SELECT ON tenant_data.%I TO atlasco_query', v_table);
    END LOOP;
END $$;

REVOKE ALL ON FUNCTION
    ensure_rollups(timestamptz, timestamptz), retire_rollups(), create_rollup(integer, text, integer[], timestamptz),
    create_projection(integer, text, text, integer[]), drop_rollup(integer, text), drop_projection(integer, text),
    remove_projection(integer), delete_entity(integer, text, uuid)
FROM public;

-- How far the rollups are is part of every answer from them; it tells nothing about any tenant.
GRANT SELECT ON outbox_consumers TO atlasco_query, atlasco_ingest, atlasco_relay;
GRANT SELECT ON rollups, projections, entity_deletions TO atlasco_ingest;
-- Needed to lock a device's row while a stream of it is opened.
GRANT UPDATE (created_at) ON entities TO atlasco_ingest;
GRANT EXECUTE ON FUNCTION
    create_rollup(integer, text, integer[], timestamptz), create_projection(integer, text, text, integer[]),
    drop_rollup(integer, text), drop_projection(integer, text), delete_entity(integer, text, uuid)
TO atlasco_ingest;

GRANT USAGE ON SCHEMA public, projections TO atlasco_rollup;
GRANT SELECT ON
    schema_migrations, settings, tenants, entities, attributes, history_partitions, outbox, loaded_lanes, rollups,
    projections
TO atlasco_rollup;
GRANT INSERT ON outbox TO atlasco_rollup;
GRANT USAGE ON SEQUENCE outbox_ids TO atlasco_rollup;
GRANT SELECT, INSERT, UPDATE, DELETE ON
    leases, lease_members, outbox_consumers, entity_deletions, rollup_minute_double, rollup_hour_double,
    rollup_minute_bigint, rollup_hour_bigint
TO atlasco_rollup;
GRANT UPDATE, DELETE ON rollups TO atlasco_rollup;
GRANT UPDATE ON projections TO atlasco_rollup;
-- To delete devices. UPDATE, for rows are locked before they are deleted.
GRANT SELECT, UPDATE, DELETE ON
    entity_attributes_double, entity_attributes_bigint, entity_attributes_boolean, entity_attributes_text,
    latest_values, device_streams, device_sessions, stream_rejections, quarantine
TO atlasco_rollup;
GRANT EXECUTE ON FUNCTION
    ensure_outbox(timestamptz, timestamptz), ensure_rollups(timestamptz, timestamptz), retire_rollups(),
    remove_projection(integer), tenant_slot(integer)
TO atlasco_rollup;

-- A name whose device is being deleted cannot be registered.
CREATE OR REPLACE FUNCTION register_entity(
    p_tenant integer, p_external_id text, p_type text, p_labels jsonb, p_force boolean DEFAULT false
) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_id bigint;
BEGIN
    SELECT entity_id INTO v_id FROM entities WHERE tenant_id = p_tenant AND external_id = p_external_id;
    IF FOUND OR NOT (p_force OR (SELECT register_entities FROM tenants WHERE tenant_id = p_tenant)) THEN
        RETURN v_id;
    END IF;
    -- The device of this name is being deleted: until that is done nobody may take the name.
    IF EXISTS (SELECT FROM entity_deletions
                WHERE tenant_id = p_tenant AND external_id = p_external_id AND ended_at IS NULL) THEN
        RETURN NULL;
    END IF;
    INSERT INTO entities (tenant_id, external_id, entity_type, labels)
    VALUES (p_tenant, p_external_id, p_type, p_labels)
    ON CONFLICT (tenant_id, external_id) DO NOTHING;
    SELECT entity_id INTO STRICT v_id FROM entities WHERE tenant_id = p_tenant AND external_id = p_external_id;
    RETURN v_id;
END $$;

-- A device that is gone cannot open a stream.
CREATE OR REPLACE FUNCTION open_stream(
    p_tenant integer, p_entity bigint, p_session uuid, OUT epoch bigint, OUT committed_sequence bigint
)
-- A gateway that froze in the middle of a write holds its devices' rows: their hellos must not wait on its connection
-- for long, or they keep those of everybody else out.
LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
#variable_conflict use_column
DECLARE
    v_old device_streams;
BEGIN
    -- Deleted since its name was looked up. The lock holds a deletion back until this commits.
    PERFORM FROM entities e WHERE e.tenant_id = p_tenant AND e.entity_id = p_entity FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'device % is gone', p_entity USING ERRCODE = 'serialization_failure';
    END IF;
    INSERT INTO device_streams (tenant_id, entity_id, epoch, session_id, committed_sequence)
    VALUES (p_tenant, p_entity, 0, p_session, 0)
    ON CONFLICT (tenant_id, entity_id) DO NOTHING;
    SELECT * INTO STRICT v_old FROM device_streams s
     WHERE s.tenant_id = p_tenant AND s.entity_id = p_entity FOR NO KEY UPDATE;
    open_stream.committed_sequence := v_old.committed_sequence;
    IF v_old.session_id <> p_session THEN
        INSERT INTO device_sessions (tenant_id, entity_id, session_id, committed_sequence, seen_at)
        VALUES (p_tenant, p_entity, v_old.session_id, v_old.committed_sequence, v_old.seen_at)
        ON CONFLICT (tenant_id, entity_id, session_id)
        DO UPDATE SET committed_sequence = excluded.committed_sequence, seen_at = excluded.seen_at;
        open_stream.committed_sequence := coalesce(
            (SELECT d.committed_sequence FROM device_sessions d
              WHERE d.tenant_id = p_tenant AND d.entity_id = p_entity AND d.session_id = p_session), 0);
    END IF;
    UPDATE device_streams s
       SET epoch = s.epoch + 1, session_id = p_session, seen_at = now(),
           committed_sequence = open_stream.committed_sequence
     WHERE s.tenant_id = p_tenant AND s.entity_id = p_entity
    RETURNING s.epoch INTO open_stream.epoch;
END $$;

-- The outbox is kept for everybody who follows it.
CREATE OR REPLACE FUNCTION retire_outbox(
    p_after text, p_margin interval, OUT leaf text, OUT outcome text, OUT reason text
)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public, pg_temp SET timezone = 'UTC' SET lock_timeout = '100ms' AS $$
DECLARE
    v_lanes   integer;
    v_server  text := (SELECT system_identifier::text FROM pg_control_system());
    v_through timestamptz;
    v_lane    record;
    v_needed  boolean;
BEGIN
    outcome := 'none';
    IF p_after NOT IN ('loaded', 'published') THEN
        RAISE EXCEPTION 'p_after is loaded or published, not %', p_after USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- The lock under which partitions are made: one maker or dropper at a time.
    IF NOT pg_try_advisory_xact_lock(hashtext('atlasco.outbox_partitions')) THEN
        outcome := 'postponed';
        reason := 'partitions are being made or dropped by another';
        RETURN;
    END IF;
    SELECT lanes INTO STRICT v_lanes FROM settings;
    IF p_after = 'loaded' THEN
        SELECT min(loaded_through) INTO v_through FROM loaded_lanes WHERE lane BETWEEN 0 AND v_lanes - 1
        HAVING count(*) = v_lanes;
    ELSE
        SELECT min(published_through) INTO v_through FROM relay_lanes WHERE lane BETWEEN 0 AND v_lanes - 1
        HAVING count(published_through) = v_lanes;
    END IF;
    IF v_through IS NULL THEN
        RETURN;
    END IF;
    -- Whoever else follows the outbox must have passed it too.
    SELECT least(v_through, min(coalesce(published_through, '-infinity'))) INTO v_through FROM outbox_consumers;
    SELECT c.relname INTO leaf
      FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
     WHERE i.inhparent = 'outbox'::regclass AND c.relname ~ '^outbox_[0-9]{10}$'
       AND to_timestamp(right(c.relname, 10), 'YYYYMMDDHH24') + interval '1 hour' <= least(v_through, now()) - p_margin
     ORDER BY c.relname LIMIT 1;
    IF leaf IS NULL THEN
        RETURN;
    END IF;
    outcome := 'postponed';
    IF (SELECT count(*) FROM relay_lanes WHERE lane BETWEEN 0 AND v_lanes - 1 AND server = v_server) < v_lanes
       OR EXISTS (SELECT FROM outbox_consumers WHERE server IS DISTINCT FROM v_server) THEN
        reason := 'the lanes were last drained on another server';
        RETURN;
    END IF;
    FOR v_pass IN 1..2 LOOP
        IF v_pass = 2 THEN
            EXECUTE format('ALTER TABLE outbox DETACH PARTITION %I', leaf);
        END IF;
        EXECUTE format('SELECT EXISTS (SELECT FROM %I WHERE lane < 0 OR lane >= $1)', leaf)
           INTO v_needed USING v_lanes;
        FOR v_lane IN SELECT lane, CASE p_after WHEN 'loaded' THEN loaded ELSE published END AS covered FROM relay_lanes
                      UNION ALL SELECT lane, published FROM outbox_consumers
        LOOP
            EXIT WHEN v_needed;
            -- Not visible in a snapshot: began after it, or was open then. Both are index conditions.
            EXECUTE format('SELECT EXISTS (SELECT FROM %1$I WHERE lane = $1 AND xid >= pg_snapshot_xmax($2)) OR '
                           'EXISTS (SELECT FROM %1$I WHERE lane = $1 AND xid = ANY (ARRAY(SELECT pg_snapshot_xip($2))))',
                           leaf)
               INTO v_needed USING v_lane.lane, v_lane.covered;
        END LOOP;
        IF v_needed AND v_pass = 1 THEN
            reason := 'holds a batch that is not ' || p_after;
            RETURN;
        ELSIF v_needed THEN
            RAISE EXCEPTION 'a batch was written meanwhile' USING ERRCODE = 'AT001';
        END IF;
    END LOOP;
    EXECUTE format('DROP TABLE %I', leaf);
    outcome := 'dropped';
EXCEPTION
    WHEN SQLSTATE 'AT001' THEN
        outcome := 'postponed';
        reason := 'a stalled transaction wrote to it';
    WHEN lock_not_available OR deadlock_detected THEN
        outcome := 'postponed';
        reason := 'a transaction that wrote to the outbox is still open';
END $$;

-- Queries: how fresh a source is.

-- How fresh a copy of this database is. One row, written every few tens of milliseconds by whichever gateway is first:
-- a reader that finds it in the snapshot of its data knows that everything committed before beat_at is in that snapshot
-- too, for commits become visible on a replica in the order in which they were written on the primary.
--
-- Logged, because an unlogged table is not replicated. fillfactor, so that a beat finds room beside the last one and
-- touches no index.
CREATE TABLE heartbeat (
    singleton   boolean     PRIMARY KEY DEFAULT true CHECK (singleton),
    -- Tells copies of this database from other databases: a replica's row proves nothing if it is another's.
    database_id uuid        NOT NULL DEFAULT gen_random_uuid(),
    beat_at     timestamptz NOT NULL DEFAULT '-infinity'
) WITH (fillfactor = 10);
INSERT INTO heartbeat DEFAULT VALUES;

-- Beats, unless another gateway did within p_interval or is at it; says what time it is on this server. One statement,
-- so that a beat is one round trip and one small commit.
CREATE FUNCTION beat(p_interval interval, OUT clock timestamptz, OUT database uuid, OUT beaten boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    -- Flushed here, for only what is flushed is sent to replicas; but it waits for none of them.
    SET LOCAL synchronous_commit = local;
    -- No wait for another beater: the row would only be beaten twice.
    PERFORM FROM heartbeat WHERE beat_at NOT BETWEEN clock_timestamp() - p_interval AND clock_timestamp()
        FOR NO KEY UPDATE SKIP LOCKED;
    beaten := FOUND;
    IF beaten THEN
        -- The clock is read before the commit is written: whatever was committed by then stands before it in the log.
        UPDATE heartbeat SET beat_at = clock_timestamp();
    END IF;
    SELECT h.database_id INTO STRICT database FROM heartbeat h;
    clock := clock_timestamp();
END $$;

-- The reading time below which everything of the tenant that this snapshot shows is in the warehouse: the oldest
-- reading of any batch that is not known to be loaded; 'infinity' when there is none. Batches that wait count in full,
-- corrections and deletions too. A lane that was never loaded counts with all its batches.
CREATE FUNCTION warehouse_seam(p_tenant integer) RETURNS timestamptz
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    SELECT coalesce(min(t.min_ts), 'infinity')
      FROM settings s
     CROSS JOIN LATERAL generate_series(0, s.lanes - 1) AS n (lane)
      LEFT JOIN relay_lanes r ON r.lane = n.lane
     CROSS JOIN LATERAL (
           SELECT o.tenant_ids, o.min_ts
             FROM outbox o
            WHERE o.lane = n.lane
              -- The first is what the index is asked; the second is exact.
              AND o.xid >= pg_snapshot_xmin(coalesce(r.loaded, '3:3:'))
              AND NOT pg_visible_in_snapshot(o.xid, coalesce(r.loaded, '3:3:'))
           ) o
     CROSS JOIN LATERAL unnest(o.tenant_ids, o.min_ts) AS t (tenant_id, min_ts)
     WHERE t.tenant_id = p_tenant
$$;

REVOKE ALL ON FUNCTION beat(interval), warehouse_seam(integer) FROM public;
GRANT SELECT ON heartbeat TO atlasco_ingest, atlasco_query;
GRANT EXECUTE ON FUNCTION beat(interval) TO atlasco_ingest;
GRANT EXECUTE ON FUNCTION warehouse_seam(integer) TO atlasco_query;
-- Which id a name stands for must be found in the snapshot of the data.
GRANT SELECT (tenant_id, name) ON tenants TO atlasco_query;
