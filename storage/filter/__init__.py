"""Conditions on devices: a language after AIP-160, in four steps that do no I/O.

    syntax    text → tree, or FilterInvalid with a position
    bind      tree + the tenant's attributes → typed tree, or FilterInvalid, AttributeNotFound, LatestNotKept
    evaluate  typed tree + one device in memory → true or false: what a filter means
    compile   typed tree → a parameterised SQL condition that means the same

The grammar is in query.proto, at FindEntitiesRequest.filter.
"""
