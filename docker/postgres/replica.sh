#!/bin/bash
# A streaming replica: copied from the primary on the first start, kept from then on.
set -euo pipefail

if [[ ! -s "$PGDATA/PG_VERSION" ]]; then
  install --directory --owner=postgres --group=postgres --mode=0700 "$PGDATA"
  # -R writes the connection to the primary, and the file that makes the server a standby.
  PGPASSWORD=development gosu postgres pg_basebackup \
    --host=postgres --username=replicator --pgdata="$PGDATA" --wal-method=stream --checkpoint=fast -R
fi

# Feedback, so that the primary keeps the rows that a query here still reads. Where replay is in conflict with a query all
# the same it waits a second and not half a minute, in which every answer of this server would be stale.
exec docker-entrypoint.sh postgres -cmax_connections=100 -cmax_locks_per_transaction=256 -cmax_wal_senders=8 \
  -chot_standby_feedback=on -cmax_standby_streaming_delay=1s
