# Values that production must refuse, each by the validation that names the way out. `merge` changes one field
# of what the tfvars file gives. A run may expect one failure of each variable, so the cases go in rounds,
# and a round fails if any one of its values is let through.
#
#   terraform test -var-file=prod.tfvars -filter=tests/validation_prod.tftest.hcl

mock_provider "aws" {
  source          = "./tests/mocks"
  override_during = plan
}

variables {
  alert_emails = ["oncall@atlasco.test"]
}

run "round_1" {
  command = plan

  variables {
    # Deletable production.
    deletion_protection = false
    # One zone decides for all.
    nat_gateways = "single"
    # No standby.
    postgres = merge(var.postgres, { topology = "instance" })
    # Published would mean held by one broker.
    kafka = merge(var.kafka, { min_insync_replicas = 1 })
    # Serverless that never sleeps.
    warehouse = merge(var.warehouse, { kind = "serverless" })
    # Nodes AWS takes back.
    cluster = merge(var.cluster, { node_groups = { general = { instance_types = ["m7i.xlarge"], capacity_type = "SPOT", min_size = 3, desired_size = 3, max_size = 9 } } })
    # Alarms nobody reads.
    alert_emails = []
    # A month of logs.
    log_retention_days = 30
  }

  expect_failures = [
    var.deletion_protection,
    var.nat_gateways,
    var.postgres,
    var.kafka,
    var.warehouse,
    var.cluster,
    var.alert_emails,
    var.log_retention_days,
  ]
}

run "round_2" {
  command = plan

  variables {
    # A week of backups.
    postgres = merge(var.postgres, { backup_retention_days = 7 })
    # A single node.
    warehouse = merge(var.warehouse, { node_count = 1 })
    # A zone without a node.
    cluster = merge(var.cluster, { node_groups = { general = { instance_types = ["m7i.xlarge"], min_size = 2, desired_size = 2, max_size = 9 } } })
  }

  expect_failures = [
    var.postgres,
    var.warehouse,
    var.cluster,
  ]
}
