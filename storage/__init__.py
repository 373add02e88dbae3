"""Storage: the PostgreSQL schema, the write transaction, reads, partitions and migrations."""
