"""The audit of `atlasco verify`: what PostgreSQL, the log and the warehouse hold, compared.

readings   do they hold the same readings, each once? here are PostgreSQL and the warehouse as stores to compare
log        the log as a store to compare
deletions  is everything of a deleted device gone, from everywhere?
"""
