-- Where each tenant's readings begin to be gone, which its retention alone does not say once that was raised.

-- The view first, as its readers do, and through it the table: ALTER TABLE alone would have the table when it asks for
-- the view, while readers who came meanwhile have the view and wait for the table.
LOCK TABLE tenant_data.tenants IN ACCESS EXCLUSIVE MODE;
ALTER TABLE tenants ADD COLUMN kept_from timestamptz NOT NULL DEFAULT '-infinity';
-- The view's columns are those that the table had when the view was made.
CREATE OR REPLACE VIEW tenant_data.tenants AS
SELECT * FROM public.tenants WHERE tenant_id = public.visible_tenant();

-- A retention changes: what the one before gave up does not come back with a longer one, and much of what is made of
-- readings (latest values, rollups) ended there too. A tenant that has no device, or whose customer partition begins
-- later, has given up nothing: its history may still be brought in.
CREATE FUNCTION give_up_by_retention() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_given_up timestamptz := clock_timestamp() - OLD.retention;
BEGIN
    IF EXISTS (SELECT FROM entities WHERE tenant_id = OLD.tenant_id)
       AND EXISTS (SELECT FROM tenant_slot(OLD.tenant_id) s JOIN history_partitions h USING (tenant_from)
                    WHERE h.ts_from < v_given_up) THEN
        NEW.kept_from := greatest(NEW.kept_from, v_given_up);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER retention_changes BEFORE UPDATE OF retention ON tenants FOR EACH ROW
    WHEN (NEW.retention IS DISTINCT FROM OLD.retention) EXECUTE FUNCTION give_up_by_retention();

REVOKE ALL ON FUNCTION give_up_by_retention() FROM public;
