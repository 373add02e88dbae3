-- Where each tenant's readings begin to be gone, which its retention alone does not say once that was raised.

ALTER TABLE tenants ADD COLUMN kept_from timestamptz NOT NULL DEFAULT '-infinity';
-- The view's columns are those that the table had when the view was made.
CREATE OR REPLACE VIEW tenant_data.tenants AS
SELECT * FROM public.tenants WHERE tenant_id = public.visible_tenant();

-- Of what was dropped before this migration, retired ranges tell. Rows that were deleted one by one, under a retention
-- that was shorter than a neighbour's and has been raised since, left no trace: where that happened, an operator sets
-- kept_from (docs/operations.md).
UPDATE tenants t SET kept_from = r.ts_to
  FROM (SELECT tenant_from, tenant_to, max(ts_to) AS ts_to FROM history_partitions
         WHERE retired_at IS NOT NULL GROUP BY tenant_from, tenant_to) r
 WHERE t.tenant_id >= r.tenant_from AND t.tenant_id < r.tenant_to;

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

-- A range is retired: all its tenants' readings in it are given up, whatever their retention becomes.
CREATE FUNCTION give_up_range() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE tenants SET kept_from = NEW.ts_to
     WHERE tenant_id >= NEW.tenant_from AND tenant_id < NEW.tenant_to AND kept_from < NEW.ts_to;
    RETURN NULL;
END $$;
CREATE TRIGGER range_is_retired AFTER UPDATE OF retired_at ON history_partitions FOR EACH ROW
    WHEN (OLD.retired_at IS NULL AND NEW.retired_at IS NOT NULL) EXECUTE FUNCTION give_up_range();

REVOKE ALL ON FUNCTION give_up_by_retention(), give_up_range() FROM public;
