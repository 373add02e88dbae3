-- Who may write, and what names mean.

-- name: fixed_settings
-- Numbers that are fixed for the life of the database.
SELECT buckets, lanes FROM settings

-- name: find_tenant
-- A tenant with what binds its writes. Intervals in microseconds; the window never reaches behind the retention.
SELECT tenant_id, name,
       (extract(epoch FROM least(window_past, retention)) * 1000000)::bigint,
       (extract(epoch FROM window_future) * 1000000)::bigint,
       outside_window = 'quarantine'
  FROM tenants
 WHERE name = %(name)s

-- name: register_tenant
-- First sight of a tenant, where the gateway allows it.
SELECT register_tenant(%(name)s)

-- name: register_entity
-- First sight of a device, or its id.
SELECT register_entity(%(tenant)s, %(name)s, %(type)s, %(labels)s)

-- name: register_attributes
-- First sight of attributes, or their ids.
SELECT attribute_id, name, type::text, keeps_latest, refusal
  FROM register_attributes(%(tenant)s, %(names)s, %(types)s::attribute_type[], %(units)s)

-- name: attributes
-- All attributes of a tenant; an operator may have changed what is kept of them.
SELECT attribute_id, name, type::text, keeps_latest FROM attributes WHERE tenant_id = %(tenant)s

-- name: open_stream
-- A hello: the new epoch, and where the session stands.
SELECT epoch, committed_sequence FROM open_stream(%(tenant)s, %(entity)s, %(session)s)

-- name: unconfirmed_rejections
-- What the device was told, or was about to be told, and has not confirmed.
SELECT rejections FROM stream_rejections
 WHERE tenant_id = %(tenant)s AND entity_id = %(entity)s AND session_id = %(session)s
 ORDER BY sequence
 LIMIT %(limit)s

-- name: confirm_rejections
-- The device has taken note.
DELETE FROM stream_rejections
 WHERE tenant_id = %(tenant)s AND entity_id = %(entity)s AND session_id = %(session)s AND sequence <= %(sequence)s

-- name: find_dictionary
-- A dictionary that a client names by id.
SELECT definition FROM dictionaries WHERE tenant_id = %(tenant)s AND dictionary_id = %(dictionary)s

-- name: touch_dictionary
-- Kept alive by use; at most one write a day.
UPDATE dictionaries SET last_used = current_date
 WHERE tenant_id = %(tenant)s AND dictionary_id = %(dictionary)s AND last_used < current_date

-- name: store_dictionary
-- Bounded for each tenant: beyond the bound a dictionary still works, it is just sent whole every time.
INSERT INTO dictionaries (tenant_id, dictionary_id, definition)
SELECT %(tenant)s, %(dictionary)s, %(definition)s
 WHERE (SELECT count(*) FROM dictionaries WHERE tenant_id = %(tenant)s) < %(limit)s
ON CONFLICT (tenant_id, dictionary_id) DO NOTHING
