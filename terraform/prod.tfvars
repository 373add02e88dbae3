# Production: three zones, a standby for everything that holds readings, protected from deletion. Sizes
# start a fleet of about one million devices at 10,000 readings a second, kept for 30 days (docs/sizing.md); grow
# them by measurement.

environment         = "prod"
region              = "eu-west-1"
availability_zones  = ["eu-west-1a", "eu-west-1b", "eu-west-1c"]
deletion_protection = true
tags                = { Owner = "telemetry-platform", CostCenter = "telemetry-prod" }

vpc_cidr     = "10.40.0.0/16"
nat_gateways = "per_az"

postgres = {
  topology                    = "multi_az_cluster"
  instance_class              = "db.r6gd.2xlarge"
  storage_type                = "io2"
  allocated_storage_gib       = 6000
  iops                        = 12000
  max_connections             = 1300
  max_wal_size_mib            = 32768
  backup_retention_days       = 35
  performance_insights_days   = 465
  monitoring_interval_seconds = 15
}

kafka = {
  broker_count        = 3
  instance_type       = "kafka.m7g.large"
  storage_gib         = 500
  max_storage_gib     = 4000
  replication_factor  = 3
  min_insync_replicas = 2
  partitions          = 48
  retention_hours     = 168
  enhanced_monitoring = "PER_TOPIC_PER_BROKER"
}

warehouse = {
  kind                        = "cluster"
  node_type                   = "ra3.xlplus"
  node_count                  = 2
  snapshot_retention_days     = 35
  concurrency_scaling_max     = 2
  concurrency_scaling_minutes = 120
}

staging = { parquet_retention_days = 400 }

cluster = {
  public_access_cidrs = []
  container_insights  = true
  node_groups = {
    # Gateways are bound by one core each and by memory for idle streams.
    gateway = {
      instance_types = ["c7i.2xlarge", "c6i.2xlarge"]
      min_size       = 3
      desired_size   = 3
      max_size       = 30
    }
    # Relay, loader, rollup worker, jobs and controllers.
    general = {
      instance_types = ["m7i.xlarge", "m6i.xlarge"]
      min_size       = 3
      desired_size   = 3
      max_size       = 9
    }
  }
}

# Replace before applying: a placeholder makes every plan warn that alarms reach nobody.
alert_emails       = ["oncall@atlasco.example"]
monthly_budget_usd = 18000
log_retention_days = 365
