-- The catalog of a local warehouse: which Parquet files it consists of, and how far it was loaded. All of it changes
-- in one transaction per load, so that files, offsets and watermarks can never disagree.

CREATE SCHEMA warehouse;

-- Who loads: reads what a rebuild needs, writes the catalog.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'atlasco_loader') THEN
        CREATE ROLE atlasco_loader NOLOGIN;
    END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL;
END $$;

-- One row: the content since the last rebuild.
CREATE TABLE warehouse.generation (
    singleton  boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    generation integer NOT NULL DEFAULT 1,
    -- The rebuild under way will have this generation; until it finishes nothing is loaded.
    rebuilding integer
);
INSERT INTO warehouse.generation DEFAULT VALUES;

-- One row per partition of the log. A load locks the rows of its partitions first.
CREATE TABLE warehouse.load_state (
    partition      integer     PRIMARY KEY,
    topic_id       text        NOT NULL,
    next_offset    bigint      NOT NULL,
    -- Why the partition cannot go on; empty when it can.
    halted         text        NOT NULL DEFAULT '',
    -- The snapshot of the last rebuild, as long as changes that it holds may still come: until every lane's watermark
    -- in this partition has passed snapshot_through_us.
    snapshot       text,
    snapshot_through_us bigint,
    updated_at     timestamptz NOT NULL DEFAULT now()
);

-- The reading time from which a rebuild replaced a tenant's content.
CREATE TABLE warehouse.rebuild_floors (
    tenant_id integer PRIMARY KEY,
    floor_us  bigint  NOT NULL
);

CREATE TABLE warehouse.files (
    file_id    bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- base_<type>, delta_<type>, entities, attributes, tenants.
    kind       text        NOT NULL,
    -- Below the warehouse's directory.
    path       text        NOT NULL UNIQUE,
    rows       bigint      NOT NULL,
    bytes      bigint      NOT NULL,
    min_tenant integer     NOT NULL,
    max_tenant integer     NOT NULL,
    min_ts_us  bigint,
    max_ts_us  bigint,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- Replaced, and kept only for the queries that began before.
    removed_at timestamptz
);
CREATE INDEX files_in_use ON warehouse.files (kind) WHERE removed_at IS NULL;
CREATE INDEX files_removed ON warehouse.files (removed_at) WHERE removed_at IS NOT NULL;

-- The change records that were loaded: a record may be delivered again. The key is a record's whole identity: one write
-- transaction may touch several tenants in one bucket, and write and delete in it.
CREATE TABLE warehouse.batches (
    batch_id  uuid        NOT NULL,
    tenant_id integer     NOT NULL,
    bucket    smallint    NOT NULL,
    deletes   boolean     NOT NULL,
    part      integer     NOT NULL,
    loaded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (batch_id, tenant_id, bucket, deletes, part)
);
CREATE INDEX batches_by_age ON warehouse.batches USING brin (loaded_at);

CREATE TABLE warehouse.watermarks (
    lane                integer NOT NULL,
    partition           integer NOT NULL,
    lanes               integer NOT NULL,
    partitions          integer NOT NULL,
    complete_through_us bigint  NOT NULL,
    lease_epoch         bigint  NOT NULL,
    PRIMARY KEY (lane, partition)
);

-- Records that could not be decoded, until they are redriven.
CREATE TABLE warehouse.dead_letters (
    topic_id         text        NOT NULL,
    partition        integer     NOT NULL,
    record_offset    bigint      NOT NULL,
    reason           text        NOT NULL,
    affects_readings boolean     NOT NULL,
    -- What the record may touch; NULL: unknown.
    tenant_id        integer,
    bucket           integer,
    min_ts_us        bigint,
    max_ts_us        bigint,
    recorded_at      timestamptz NOT NULL DEFAULT now(),
    redriven_at      timestamptz,
    PRIMARY KEY (topic_id, partition, record_offset)
);
CREATE INDEX dead_letters_open ON warehouse.dead_letters (partition, record_offset) WHERE redriven_at IS NULL;

-- Where retention has cut; tenant 0 stands for all, for no tenant has that id.
CREATE TABLE warehouse.complete_from (
    tenant_id integer PRIMARY KEY,
    from_us   bigint  NOT NULL
);

GRANT USAGE ON SCHEMA warehouse TO atlasco_loader, atlasco_query;
GRANT SELECT ON ALL TABLES IN SCHEMA warehouse TO atlasco_query;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA warehouse TO atlasco_loader;
GRANT USAGE ON SCHEMA public TO atlasco_loader;
GRANT SELECT ON
    schema_migrations, settings, history_partitions, tenants, entities, attributes,
    entity_attributes_double, entity_attributes_bigint, entity_attributes_boolean, entity_attributes_text
TO atlasco_loader;
GRANT SELECT, INSERT, UPDATE ON loaded_lanes TO atlasco_loader;
