-- Retiring rollups failed for ever once there were so many months that the planner began with all tables' names: a
-- condition made a time of each of them.
CREATE OR REPLACE FUNCTION retire_rollups() RETURNS integer
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
           -- A join may look at the names of all tables first, and most of them are no month.
           AND CASE WHEN c.relname ~ '^rollup_[a-z_]+_[0-9]{6}$'
                    THEN to_timestamp(right(c.relname, 6), 'YYYYMM') + interval '1 month'
                         < (SELECT now() - max(retention) - interval '1 hour' FROM tenants) END
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
