# Values that every environment must refuse, each by the validation that names the way out. `merge` changes one field
# of what the tfvars file gives. A run may expect one failure of each variable, so the cases go in rounds,
# and a round fails if any one of its values is let through.
#
#   terraform test -var-file=dev.tfvars -filter=tests/validation_dev.tftest.hcl

mock_provider "aws" {
  source          = "./tests/mocks"
  override_during = plan
}

run "round_1" {
  command = plan

  variables {
    # Capitals do not fit bucket names.
    project = "AtlasCo"
    # Too short for an account.
    account_id = "12345"
    # A tag Terraform sets.
    tags = { Environment = "prod" }
    # One zone twice.
    availability_zones = ["eu-west-1a", "eu-west-1a", "eu-west-1b"]
    # Too small for pods.
    vpc_cidr = "10.0.0.0/20"
    # Not a choice.
    nat_gateways = "none"
    # Endpoints removed.
    interface_endpoints = ["sts"]
    # Not a topology.
    postgres = merge(var.postgres, { topology = "multi_az" })
    # Four brokers over three zones.
    kafka = merge(var.kafka, { broker_count = 4 })
    # Not a kind.
    warehouse = merge(var.warehouse, { kind = "provisioned" })
    # Files would vanish under running queries.
    staging = { parquet_retention_days = 1 }
    # Older than the sleep hook.
    cluster = merge(var.cluster, { version = "1.29" })
    # Capitals in a Kubernetes name.
    namespace = "Atlasco"
    # No image left to roll back to.
    kept_images = 1
    # Versions start at one.
    password_version = 0
    # Not an address.
    alert_emails = ["oncall"]
    # A budget of nothing always rings.
    monthly_budget_usd = 0
    # Not a period CloudWatch offers.
    log_retention_days = 45
  }

  expect_failures = [
    var.project,
    var.account_id,
    var.tags,
    var.availability_zones,
    var.vpc_cidr,
    var.nat_gateways,
    var.interface_endpoints,
    var.postgres,
    var.kafka,
    var.warehouse,
    var.staging,
    var.cluster,
    var.namespace,
    var.kept_images,
    var.password_version,
    var.alert_emails,
    var.monthly_budget_usd,
    var.log_retention_days,
  ]
}

run "round_2" {
  command = plan

  variables {
    # Zones of another region.
    availability_zones = ["us-east-1a", "us-east-1b", "us-east-1c"]
    # Somebody else's addresses.
    vpc_cidr = "8.8.0.0/16"
    # Older than the schema needs.
    postgres = merge(var.postgres, { engine_version = "15" })
    # An EC2 type.
    kafka = merge(var.kafka, { instance_type = "m7g.large" })
    # Not RA3.
    warehouse = merge(var.warehouse, { node_type = "dc2.large" })
    # The Kubernetes API open to the world.
    cluster = merge(var.cluster, { public_access_cidrs = ["0.0.0.0/0"] })
  }

  expect_failures = [
    var.availability_zones,
    var.vpc_cidr,
    var.postgres,
    var.kafka,
    var.warehouse,
    var.cluster,
  ]
}

run "round_3" {
  command = plan

  variables {
    # An EC2 type.
    postgres = merge(var.postgres, { instance_class = "t4g.medium" })
    # More copies than brokers.
    kafka = merge(var.kafka, { replication_factor = 3 })
    # Not a multiple of eight.
    warehouse = merge(var.warehouse, { base_capacity_rpu = 12 })
    # A name, not an ARN.
    cluster = merge(var.cluster, { admin_arns = ["operators"] })
  }

  expect_failures = [
    var.postgres,
    var.kafka,
    var.warehouse,
    var.cluster,
  ]
}

run "round_4" {
  command = plan

  variables {
    # A class without local disk.
    postgres = merge(var.postgres, { topology = "multi_az_cluster", instance_class = "db.m6g.large", allocated_storage_gib = 100 })
    # Two in sync of two copies: one restart stops publishing.
    kafka = merge(var.kafka, { min_insync_replicas = 2 })
    # No snapshots.
    warehouse = merge(var.warehouse, { snapshot_retention_days = 0 })
    # Fewer desired than the minimum.
    cluster = merge(var.cluster, { node_groups = { general = { instance_types = ["t3.large"], min_size = 3, desired_size = 2, max_size = 4 } } })
  }

  expect_failures = [
    var.postgres,
    var.kafka,
    var.warehouse,
    var.cluster,
  ]
}

run "round_5" {
  command = plan

  variables {
    # An old storage type.
    postgres = merge(var.postgres, { storage_type = "gp2" })
    # A limit below the start.
    kafka = merge(var.kafka, { max_storage_gib = 20 })
    # No nodes.
    cluster = merge(var.cluster, { node_groups = {} })
  }

  expect_failures = [
    var.postgres,
    var.kafka,
    var.cluster,
  ]
}

run "round_6" {
  command = plan

  variables {
    # No point-in-time recovery.
    postgres = merge(var.postgres, { backup_retention_days = 0 })
    # A night is longer.
    kafka = merge(var.kafka, { retention_hours = 6 })
  }

  expect_failures = [
    var.postgres,
    var.kafka,
  ]
}

run "round_7" {
  command = plan

  variables {
    # A log that fills the disk.
    postgres = merge(var.postgres, { max_wal_size_mib = 40960 })
    # Alarms without metrics.
    kafka = merge(var.kafka, { enhanced_monitoring = "DEFAULT" })
  }

  expect_failures = [
    var.postgres,
    var.kafka,
  ]
}

run "round_8" {
  command = plan

  variables {
    # More connections than snapshots bear.
    postgres = merge(var.postgres, { max_connections = 10000 })
    # A topic without partitions.
    kafka = merge(var.kafka, { partitions = 0 })
  }

  expect_failures = [
    var.postgres,
    var.kafka,
  ]
}

run "round_9" {
  command = plan

  variables {
    # Not a period RDS offers.
    postgres = merge(var.postgres, { performance_insights_days = 40 })
  }

  expect_failures = [
    var.postgres,
  ]
}

run "round_10" {
  command = plan

  variables {
    # Not an interval RDS offers.
    postgres = merge(var.postgres, { monitoring_interval_seconds = 7 })
  }

  expect_failures = [
    var.postgres,
  ]
}

# On their own: rules of other variables read these two and are not evaluated while they are invalid.
run "environment_and_region" {
  command = plan

  variables {
    # A dash would blur where the environment's name ends.
    environment = "dev-1"
    # A zone.
    region = "eu-west-1a"
  }

  expect_failures = [
    var.environment,
    var.region,
  ]
}
