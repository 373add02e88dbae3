#!/bin/bash
# Run once, on an empty data directory: the logins of the platform's processes, and the replica's. What each may do is
# granted by `atlasco migrate`.
set -euo pipefail

psql --set=ON_ERROR_STOP=1 --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" <<SQL
CREATE ROLE gateway LOGIN PASSWORD 'development';
CREATE ROLE reader LOGIN PASSWORD 'development';
CREATE ROLE relay LOGIN PASSWORD 'development';
CREATE ROLE loader LOGIN PASSWORD 'development';
CREATE ROLE rollup LOGIN PASSWORD 'development';
CREATE ROLE replicator LOGIN REPLICATION PASSWORD 'development';
SQL

# `all` does not cover replication.
echo "host replication replicator all scram-sha-256" >>"$PGDATA/pg_hba.conf"
