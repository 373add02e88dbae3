"""Conditions on devices: a language after AIP-160, in four steps that do no I/O; and finding devices by them.

    syntax    text → tree, or FilterInvalid with a position
    bind      tree + the tenant's attributes → typed tree, or FilterInvalid, AttributeNotFound, LatestNotKept
    evaluate  typed tree + one device in memory → true or false: what a filter means
    compile   typed tree → a parameterised SQL condition that means the same
    latest    a filter bound in a session, and its condition on latest values, device by device
    search    the devices that meet a filter, from their latest values or from a projection

The grammar is in query.proto, at FindEntitiesRequest.filter.
"""
