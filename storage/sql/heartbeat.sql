-- How fresh a copy of the database is; see the table heartbeat in schema.sql.

-- name: beat
-- Autocommit: the beat is worth something only once it is committed.
SELECT clock, database FROM beat(%(interval)s)

-- name: last_beat
-- On a replica: everything committed before this moment of the primary's clock can be read here. NULL when the row is
-- another database's.
SELECT (SELECT beat_at FROM public.heartbeat WHERE database_id = %(database)s)
