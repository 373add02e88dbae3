"""Questions about telemetry, each answered from one snapshot: series, latest values, devices, attributes.

    model      what is asked and answered, and the refusals (no I/O)
    session    the snapshot of one tenant, with a deadline that ends the statement in the database too
    tenants    which id a tenant's name stands for
    wire       what the database sends and takes, without the driver's conversions
    devices    latest values, devices, attributes
    series     pages of series
    pages      where a page ends, and two parts of one as one (pure)
    warehouse  pages of series, from the warehouse
    watermark  up to when rollups and projections are complete

What sums readings up is in `storage.aggregate`, what finds devices by conditions in `storage.filter`; their questions
are asked in the same sessions.
"""
