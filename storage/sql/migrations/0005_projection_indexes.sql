-- Projections: indexes that can be combined, and statistics for thresholds that few devices exceed.
--
-- Readers go on while the new indexes of existing projections are made; the worker, who alone writes to them, waits.

-- Indexes the values of a projection, one by one, for conditions on any of them. Without the tenant, who is the same in
-- every row: indexes that share a condition are never combined, for the planner takes what they have in common for all
-- there is to them. Wide statistics: a threshold that few devices exceed lies in the last piece of the histogram.
CREATE FUNCTION index_projection(p_projection integer) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    v_column record;
BEGIN
    FOR v_column IN
        SELECT attname AS name, atttypid = 'text'::regtype AS is_text FROM pg_attribute
         WHERE attrelid = format('projections.p%s', p_projection)::regclass AND attname ~ '^v[0-9]+$' ORDER BY attnum
    LOOP
        -- An index entry has a bound, a text has not; so texts are found by how they begin.
        EXECUTE format('CREATE INDEX p%1$s_%2$s ON projections.p%1$s (%3$s)', p_projection, v_column.name,
            CASE WHEN v_column.is_text THEN format('left(%s, 64)', v_column.name) ELSE v_column.name END);
        IF v_column.is_text THEN
            EXECUTE format('ALTER INDEX projections.p%s_%s ALTER COLUMN 1 SET STATISTICS 1000',
                           p_projection, v_column.name);
        ELSE
            EXECUTE format('ALTER TABLE projections.p%s ALTER COLUMN %s SET STATISTICS 1000',
                           p_projection, v_column.name);
        END IF;
    END LOOP;
END $$;

-- Declares a projection and makes its table, which the worker fills. Outcomes as of create_rollup().
CREATE OR REPLACE FUNCTION create_projection(p_tenant integer, p_name text, p_type text, p_attributes integer[]) RETURNS text
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
    PERFORM index_projection(v_id);
    EXECUTE format('CREATE VIEW tenant_data.projection_%s AS SELECT * FROM projections.p%s '
                   'WHERE tenant_id = public.visible_tenant()', v_id, v_id);
    EXECUTE format('GRANT SELECT ON tenant_data.projection_%s TO atlasco_query', v_id);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON projections.p%s TO atlasco_rollup', v_id);
    RETURN 'created';
END $$;

REVOKE ALL ON FUNCTION index_projection(integer) FROM public;

DO $$
DECLARE
    v_projection integer;
    v_index      text;
    v_indexes    text[];
BEGIN
    FOR v_projection IN SELECT projection_id FROM projections ORDER BY 1 LOOP
        v_indexes := ARRAY(SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                            WHERE i.indrelid = format('projections.p%s', v_projection)::regclass
                              AND NOT i.indisprimary AND pg_get_indexdef(i.indexrelid) !~ 'external_id');
        PERFORM index_projection(v_projection);
        EXECUTE format('ANALYZE projections.p%s', v_projection);
        -- At the end, because a drop locks readers out until this commits.
        FOREACH v_index IN ARRAY v_indexes LOOP
            EXECUTE format('DROP INDEX projections.%I', v_index);
        END LOOP;
    END LOOP;
END $$;
