-- Deletions of devices: audited by what is left, and left out of answers that the warehouse has a part in.

-- What is left of devices whose deletion has ended: how many rows of each, by table; nothing, if all went well. For the
-- audit: no login of a process may read all of these tables. p_tenant NULL: of all tenants.
CREATE FUNCTION deletion_remains(p_tenant text)
RETURNS TABLE (tenant text, entity_id bigint, external_id text, place text, found bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_table text;
BEGIN
    FOR v_table IN
        SELECT unnest(ARRAY[
            'entities', 'entity_attributes_double', 'entity_attributes_bigint', 'entity_attributes_boolean',
            'entity_attributes_text', 'latest_values', 'device_streams', 'device_sessions', 'stream_rejections',
            'quarantine', 'rollup_minute_double', 'rollup_hour_double', 'rollup_minute_bigint', 'rollup_hour_bigint'
        ])
        UNION ALL
        SELECT c.oid::regclass::text FROM pg_class c
         WHERE c.relnamespace = 'projections'::regnamespace AND c.relkind = 'r'
    LOOP
        BEGIN
            -- Counted for each device by itself: a look into an index, where a join might read all of history.
            RETURN QUERY EXECUTE format(
                'SELECT t.name, d.entity_id, d.external_id, %L::text, h.rows '
                '  FROM entity_deletions d JOIN tenants t USING (tenant_id) '
                ' CROSS JOIN LATERAL (SELECT count(*) AS rows FROM %s h '
                '                      WHERE h.tenant_id = d.tenant_id AND h.entity_id = d.entity_id) h '
                ' WHERE d.ended_at IS NOT NULL AND h.rows > 0 AND ($1 IS NULL OR t.name = $1)', v_table, v_table)
            USING p_tenant;
        EXCEPTION WHEN undefined_table THEN
            -- A projection that was dropped meanwhile.
            NULL;
        END;
    END LOOP;
END $$;

REVOKE ALL ON FUNCTION deletion_remains(text) FROM public;

-- For a rebuild of the warehouse: whose names must not come back.
GRANT SELECT ON entity_deletions TO atlasco_loader;
-- For the audit of the stores against each other.
GRANT EXECUTE ON FUNCTION deletion_remains(text) TO atlasco_loader;

-- Devices that are being deleted are gone from here and not yet from the warehouse; an answer of both leaves them out.
CREATE VIEW tenant_data.entity_deletions AS
SELECT tenant_id, entity_id, ended_at FROM public.entity_deletions WHERE tenant_id = public.visible_tenant();
GRANT SELECT ON tenant_data.entity_deletions TO atlasco_query;

-- Deletions under way say once more that the device is gone: the programs before told the warehouse of its readings only.
UPDATE entity_deletions SET step = 'settle' WHERE ended_at IS NULL AND step IN ('materializations', 'warehouse');
