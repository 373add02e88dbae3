# Development: one of everything, small, deletable. Nothing here is safe for data that matters.

environment         = "dev"
region              = "eu-west-1"
availability_zones  = ["eu-west-1a", "eu-west-1b", "eu-west-1c"]
deletion_protection = false
tags                = { Owner = "telemetry-platform", CostCenter = "telemetry-dev" }

vpc_cidr     = "10.20.0.0/16"
nat_gateways = "single"

postgres = {
  topology                  = "instance"
  instance_class            = "db.t4g.medium"
  storage_type              = "gp3"
  allocated_storage_gib     = 50
  max_allocated_storage_gib = 200
  max_connections           = 200
  max_wal_size_mib          = 4096
  backup_retention_days     = 3
  apply_immediately         = true
}

kafka = {
  broker_count        = 2
  instance_type       = "kafka.t3.small"
  storage_gib         = 50
  max_storage_gib     = 100
  replication_factor  = 2
  min_insync_replicas = 1
  partitions          = 8
  retention_hours     = 72
}

# Sleeps, and costs nothing, while nothing is loaded or asked.
warehouse = {
  kind              = "serverless"
  base_capacity_rpu = 8
  max_capacity_rpu  = 16
  daily_rpu_hours   = 48
}

staging = { parquet_retention_days = 14 }

# The Kubernetes API answers inside the VPC only, until you name the addresses you come from:
#   public_access_cidrs = ["203.0.113.7/32"]
cluster = {
  public_access_cidrs = []
  node_groups = {
    general = {
      instance_types = ["t3.large", "t3a.large"]
      min_size       = 2
      desired_size   = 2
      max_size       = 4
    }
  }
}

alert_emails       = []
monthly_budget_usd = 900
log_retention_days = 30
