-- Why a rollup is out of service, told where its owner looks.

-- The view first, as its readers do.
LOCK TABLE tenant_data.rollups IN ACCESS EXCLUSIVE MODE;
ALTER TABLE rollups ADD COLUMN problem text NOT NULL DEFAULT '';
-- The view's columns are those that the table had when the view was made.
CREATE OR REPLACE VIEW tenant_data.rollups AS
SELECT * FROM public.rollups WHERE tenant_id = public.visible_tenant();
