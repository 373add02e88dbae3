"""Storage: the PostgreSQL schema, the write transaction, reads, partitions and migrations.

    relay      from the outbox to the log
    loader     from the log to the warehouse
    warehouse  where analytics run
    rollup     the worker: keeps rollups and projections, deletes devices
    reads      questions: series, latest values, devices
    aggregate  questions: readings summed up
    filter     questions: devices by conditions
    verify     the audit: what the stores hold, compared

Beside them is the way of a batch into PostgreSQL (`registry`, `partitions`, `arrange`, `fence`, `commit`, `outbox`),
what operators do (`administration`, `quarantine`, `deletion`, `maintenance`, `migrations`), and what all of it shares.
"""
