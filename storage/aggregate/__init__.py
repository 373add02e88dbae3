"""Readings summed up, in buckets of time or over a whole range, of one device or of many.

    model       what is asked and answered (no I/O)
    buckets     buckets of time, aligned to clock and calendar (pure)
    series      types, the shape of an answer, two parts as one (pure)
    text_bound  how much text an answer may hold
    doubles     arithmetic on doubles, as SQL that cannot fail
    database    on PostgreSQL, from the readings or from rollups
    warehouse   the same questions and answers in the warehouse

The rollups are kept by `storage.rollup`.
"""
