-- What is retired from here on notes it by itself. A step of its own: the one before has the tenants for itself, and a
-- maintenance run that retires ranges has history_partitions when it reads tenants.

-- Ranges are retired: all their tenants' readings in them are given up, whatever their retention becomes. Once for all
-- ranges of a statement: a row of tenants is written once, however many of its ranges go. In the order of their ids: two
-- statements that note this for many tenants would else be a deadlock, each waiting for a row that the other has.
CREATE FUNCTION give_up_ranges() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE tenants t SET kept_from = greatest(t.kept_from, g.ts_to)
      FROM (SELECT k.tenant_id, r.ts_to
              FROM (SELECT n.tenant_from, n.tenant_to, max(n.ts_to) AS ts_to
                      FROM ranges_now n JOIN ranges_before b USING (tenant_from, ts_from)
                     WHERE b.retired_at IS NULL AND n.retired_at IS NOT NULL
                     GROUP BY n.tenant_from, n.tenant_to) r
              JOIN tenants k ON k.tenant_id >= r.tenant_from AND k.tenant_id < r.tenant_to AND k.kept_from < r.ts_to
             ORDER BY k.tenant_id FOR NO KEY UPDATE OF k) g
     WHERE t.tenant_id = g.tenant_id;
    RETURN NULL;
END $$;
-- Not OF retired_at: a trigger that is given the changed rows cannot name columns.
CREATE TRIGGER ranges_are_retired AFTER UPDATE ON history_partitions
    REFERENCING OLD TABLE AS ranges_before NEW TABLE AS ranges_now
    FOR EACH STATEMENT EXECUTE FUNCTION give_up_ranges();

REVOKE ALL ON FUNCTION give_up_ranges() FROM public;
