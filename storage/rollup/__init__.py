"""The worker that keeps rollups and projections, fills new ones, and deletes devices.

follow      what the outbox says has changed since the last round, by the relay's snapshot cursor
dirty       which minutes and which devices that makes stale (pure)
buckets     minutes from readings, hours from minutes
projection  rows from latest values
backfill    what was there before the declaration, newest first
declare     the declarations: create, list, drop
rests       how long what failed is left alone
isolation   what one tenant's data breaks goes out of service by itself
worker      the work under one lease: rounds, back-fills, deletions, housekeeping
service     the process: one worker at a time, under a lease
"""
