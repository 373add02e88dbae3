-- Relay: what carries the outbox to the log, and forgets it once it is loaded.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'atlasco_relay') THEN
        CREATE ROLE atlasco_relay NOLOGIN;
    END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL;
END $$;

-- One lane's batches in the order of its cursor.
CREATE INDEX outbox_by_lane ON outbox (lane, xid, id);

-- Work that one process may do at a time. Expiry is on the database's clock.
CREATE TABLE leases (
    scope      text        NOT NULL,
    item       integer     NOT NULL,
    -- NULL: nobody's.
    holder     uuid,
    -- Fencing token: grows with every change of hands, also across a restore of the database (it is at least the
    -- clock, in microseconds), so that whoever remembers a newer one refuses an older.
    epoch      bigint      NOT NULL DEFAULT 0,
    expires_at timestamptz NOT NULL DEFAULT '-infinity',
    PRIMARY KEY (scope, item)
) WITH (fillfactor = 50);

-- The processes that share the work of a scope.
CREATE TABLE lease_members (
    scope      text        NOT NULL,
    member     uuid        NOT NULL,
    -- For people: host and process.
    label      text        NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (scope, member)
) WITH (fillfactor = 50);

-- How far each lane of the outbox has come. Everything visible in "published" is in the log; while "target" is set, so
-- is everything up to (sent_xid, sent_id), in that order, of what is visible in it.
CREATE TABLE relay_lanes (
    lane              smallint    PRIMARY KEY,
    -- Of the lease under which the row was last written; a smaller one is refused.
    epoch             bigint      NOT NULL DEFAULT 0,
    -- '3:3:' is the snapshot in which nothing is visible.
    published         pg_snapshot NOT NULL DEFAULT '3:3:',
    -- The primary's clock before "published" was taken: every batch committed before it is in the log.
    published_through timestamptz,
    target            pg_snapshot,
    target_at         timestamptz,
    sent_xid          xid8,
    sent_id           bigint,
    -- Where the snapshots were taken, and the topic that was written to: elsewhere they mean nothing.
    server            text,
    timeline          text,
    topic_id          text,
    -- A past value of (published, published_through) that waits to be loaded …
    checkpoint        pg_snapshot,
    checkpoint_at     timestamptz,
    -- … and the last one that was: everything visible in it is in the warehouse.
    loaded            pg_snapshot NOT NULL DEFAULT '3:3:',
    updated_at        timestamptz NOT NULL DEFAULT now(),
    CHECK ((target IS NULL) = (target_at IS NULL)),
    CHECK ((sent_xid IS NULL) = (sent_id IS NULL))
) WITH (fillfactor = 50);

-- Written by the loader: every batch of the lane that was committed before loaded_through is in the warehouse.
CREATE TABLE loaded_lanes (
    lane           smallint    PRIMARY KEY,
    loaded_through timestamptz NOT NULL,
    updated_at     timestamptz NOT NULL DEFAULT now()
);

-- Drops the oldest outbox partition if nobody needs it any more. p_after: 'loaded', or 'published' where there is no
-- warehouse. p_margin: how long to keep it beyond that.
--
-- outcome: 'none' (no partition is old enough), 'dropped', 'postponed' (reason says why; try again later).
--
-- 1. Cheap checks: the partition ended long enough before what every lane has reached, and no batch in it lies
--    outside that.
-- 2. Detach. This waits for transactions that wrote to the outbox, 100 ms at most: new ones queue behind it.
-- 3. Check again. No writer of the partition is left, so what is seen now is all there will ever be: a transaction
--    that stalled, and wrote or committed after step 1, shows here.
-- 4. Drop, in the same transaction. Anything but success leaves the partition attached.
CREATE FUNCTION retire_outbox(
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
    SELECT c.relname INTO leaf
      FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
     WHERE i.inhparent = 'outbox'::regclass AND c.relname ~ '^outbox_[0-9]{10}$'
       AND to_timestamp(right(c.relname, 10), 'YYYYMMDDHH24') + interval '1 hour' <= least(v_through, now()) - p_margin
     ORDER BY c.relname LIMIT 1;
    IF leaf IS NULL THEN
        RETURN;
    END IF;
    outcome := 'postponed';
    IF (SELECT count(*) FROM relay_lanes WHERE lane BETWEEN 0 AND v_lanes - 1 AND server = v_server) < v_lanes THEN
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

REVOKE ALL ON FUNCTION retire_outbox(text, interval) FROM public;

GRANT USAGE ON SCHEMA public TO atlasco_relay;
GRANT SELECT ON schema_migrations, settings, outbox TO atlasco_relay;
-- After a restore by copying, old transaction ids mean nothing and are replaced.
GRANT UPDATE (xid) ON outbox TO atlasco_relay;
GRANT SELECT, INSERT, UPDATE, DELETE ON leases, lease_members, relay_lanes TO atlasco_relay;
GRANT SELECT ON loaded_lanes TO atlasco_relay;
GRANT EXECUTE ON FUNCTION retire_outbox(text, interval) TO atlasco_relay;
