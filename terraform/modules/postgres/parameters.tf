# The parameter group. Every value departs from the RDS default for a reason given beside it; what is
# not listed keeps the default (shared_buffers at a quarter of memory, effective_cache_size at half,
# checkpoint_completion_target at 0.9, full_page_writes and fsync on).
#
# `pending-reboot` marks parameters that PostgreSQL reads only at start: a change waits for a restart
# that an operator chooses.

locals {
  major_version = split(".", var.settings.engine_version)[0]
  family        = "postgres${local.major_version}"

  parameters = {
    # --- Access ---------------------------------------------------------------------------------

    # Refuses connections without TLS. Readings and passwords cross availability zones.
    "rds.force_ssl" = { value = "1", apply = "immediate" }
    # An MD5 verifier can be replayed by whoever reads it; SCRAM's cannot. The first parameter makes new
    # verifiers SCRAM, the second refuses to log in with an old one.
    "password_encryption"               = { value = "scram-sha-256", apply = "immediate" }
    "rds.accepted_password_auth_method" = { value = "scram", apply = "immediate" }

    # --- Durability -----------------------------------------------------------------------------

    # The default, pinned: an acknowledged reading is durable only because COMMIT waits for the log. A
    # person who turns this off "to speed up COPY" must meet a diff.
    "synchronous_commit" = { value = "on", apply = "immediate" }

    # --- The write path: COPY in batches every few milliseconds, from many lanes -----------------

    # Checkpoints by time and not by volume. Each checkpoint makes the next change of every page write
    # the whole page to the log; with steady COPY a small limit would start one every few seconds and
    # double the log volume.
    "max_wal_size" = { value = tostring(var.settings.max_wal_size_mib), apply = "immediate" }
    # Log segments of a quiet hour stay allocated for the next busy one; creating and zeroing segments
    # during a burst shows as commit latency.
    "min_wal_size" = { value = tostring(floor(var.settings.max_wal_size_mib / 4)), apply = "immediate" }
    # Fewer full-page images than at the default of 5 minutes. The price is crash recovery: at most the
    # log of 15 minutes is replayed. A Multi-AZ failover promotes a standby that has replayed already.
    "checkpoint_timeout" = { value = "900", apply = "immediate" }
    # 64 MiB (in 8 KiB pages). The default stops at 16 MiB, which parallel COPY batches fill between two
    # flushes; a lane then waits for another lane's write.
    "wal_buffers" = { value = "8192", apply = "pending-reboot" }
    # lz4 costs little processor time and shortens the full-page images that remain; log volume is what
    # the standbys and the backup have to keep up with.
    "wal_compression" = { value = "lz4", apply = "immediate" }

    # --- Vacuum: append-only history, one hot table of latest values -----------------------------

    # Hundreds of partitions: with the default of 3 workers one freezing a large partition starves the
    # table of latest values.
    "autovacuum_max_workers" = { value = "6", apply = "pending-reboot" }
    # Looks for work every 15 s instead of 60 s: the table of latest values turns over in minutes.
    "autovacuum_naptime" = { value = "15", apply = "immediate" }
    # The cost budget is shared by all workers. The default is of the age of spinning disks; too small a
    # budget ends in a wraparound vacuum at the worst hour.
    "autovacuum_vacuum_cost_limit" = { value = "2000", apply = "immediate" }
    # Dead rows come from updates that were not HOT, and from corrections: few, but in big tables, where
    # the default of 20% means tens of millions.
    "autovacuum_vacuum_scale_factor" = { value = "0.05", apply = "immediate" }
    # History partitions see inserts only. Vacuuming them after 10% growth sets the visibility map (index
    # only scans) and freezes early, while pages are still cached.
    "autovacuum_vacuum_insert_scale_factor" = { value = "0.1", apply = "immediate" }
    # A partition that filled by 10% since the last analyze has a wrong upper bound for the timestamp, and
    # the planner guesses one row for "the last minute".
    "autovacuum_analyze_scale_factor" = { value = "0.02", apply = "immediate" }

    # --- The read path --------------------------------------------------------------------------

    # Network SSD: a random page costs about what a sequential one does. The default of 4 favours
    # scanning a partition over using its primary key.
    "random_page_cost" = { value = "1.1", apply = "immediate" }
    # Prefetch depth of bitmap scans on storage that serves many requests at once; the default suits one
    # disk.
    "effective_io_concurrency" = { value = "64", apply = "immediate" }
    # Compiling a plan over many partitions takes longer than the 100 ms a dashboard query may take.
    "jit" = { value = "0", apply = "immediate" }
    # Sorts and hashes of dashboard queries stay in memory (in KiB: 32 MiB); times the connections that
    # sort at once this stays below the memory outside shared_buffers.
    "work_mem" = { value = "32768", apply = "immediate" }

    # --- Connections and locks ------------------------------------------------------------------

    # Pools of all pods plus the maintenance job, and on a standby that was just promoted those that read from it, and
    # no more: the default grows with memory into
    # thousands, each of which makes every snapshot dearer.
    "max_connections" = { value = tostring(var.settings.max_connections), apply = "pending-reboot" }
    # A statement that cannot prune locks every leaf and its indexes: up to about 2,000 leaves for each
    # parent. With the default of 64 for each connection, pg_dump and a DDL on the parent run out of slots.
    "max_locks_per_transaction" = { value = "256", apply = "pending-reboot" }
    # A client that hangs inside a transaction holds back vacuum and partition maintenance. One minute is
    # far above any batch and far below harm.
    "idle_in_transaction_session_timeout" = { value = "60000", apply = "immediate" }
    # Notices a peer that vanished (a killed node) after 60 + 3 x 10 s, not after two hours: its locks on
    # the device rows would block the device's new stream.
    "tcp_keepalives_idle"     = { value = "60", apply = "immediate" }
    "tcp_keepalives_interval" = { value = "10", apply = "immediate" }
    "tcp_keepalives_count"    = { value = "3", apply = "immediate" }

    # --- Standbys that answer queries -----------------------------------------------------------

    # The table of latest values is pruned all the time; without feedback each prune conflicts with the
    # standby's running queries. Feedback makes the primary keep those rows a little longer instead.
    "hot_standby_feedback" = { value = "1", apply = "immediate" }
    # Where a conflict remains (a dropped partition), replay goes on after one second and the query is
    # cancelled; the router asks the primary. Replay that waits for a query makes every answer stale.
    "max_standby_streaming_delay" = { value = "1000", apply = "immediate" }

    # --- Observation ----------------------------------------------------------------------------

    # Statement statistics, for Performance Insights and the runbooks.
    "shared_preload_libraries" = { value = "pg_stat_statements", apply = "pending-reboot" }
    # Times reads and writes of each statement: tells a slow disk from a bad plan. The clock is cheap on
    # current instances.
    "track_io_timing" = { value = "1", apply = "immediate" }
    # A quarter of a second is well past the dashboard target, and rare: the log stays readable.
    "log_min_duration_statement" = { value = "250", apply = "immediate" }
    # Schema changes are audited; data statements are not logged, their values belong to tenants.
    "log_statement" = { value = "ddl", apply = "immediate" }
    # A wait for a lock longer than deadlock_timeout is a fault in the row ordering of the write path.
    "log_lock_waits" = { value = "1", apply = "immediate" }
    # Sorts that spill more than 10 MiB (in KiB) ask for an index or a rollup.
    "log_temp_files" = { value = "10240", apply = "immediate" }
    # Vacuums longer than 10 s, which compete with ingest.
    "log_autovacuum_min_duration" = { value = "10000", apply = "immediate" }
  }
}

resource "aws_db_parameter_group" "this" {
  count = local.is_cluster ? 0 : 1

  name_prefix = "${var.name}-${local.major_version}-"
  family      = local.family
  description = "COPY ingest with point reads; each value is explained in modules/postgres/parameters.tf."

  dynamic "parameter" {
    for_each = local.parameters

    content {
      name         = parameter.key
      value        = parameter.value.value
      apply_method = parameter.value.apply
    }
  }

  # A major upgrade needs the new family's group before the old one can go.
  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_rds_cluster_parameter_group" "this" {
  count = local.is_cluster ? 1 : 0

  name_prefix = "${var.name}-${local.major_version}-"
  family      = local.family
  description = "COPY ingest with point reads; each value is explained in modules/postgres/parameters.tf."

  dynamic "parameter" {
    for_each = local.parameters

    content {
      name         = parameter.key
      value        = parameter.value.value
      apply_method = parameter.value.apply
    }
  }

  lifecycle {
    create_before_destroy = true
  }
}
