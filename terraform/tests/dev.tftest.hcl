# What development must be, planned from dev.tfvars with a mocked provider: small, deletable, and no less
# private or encrypted than production.
#
#   terraform test -var-file=dev.tfvars -filter=tests/dev.tftest.hcl

mock_provider "aws" {
  source          = "./tests/mocks"
  override_during = plan
}

variables {
  # Inputs of single modules.
  name                        = "atlasco-dev"
  vpc_id                      = "vpc-1"
  subnet_ids                  = ["subnet-a", "subnet-b", "subnet-c"]
  client_security_group_ids   = { cluster = "sg-cluster" }
  logs_kms_key_arn            = "arn:aws:kms:eu-west-1:123456789012:key/logs"
  endpoints_security_group_id = "sg-endpoints"
  s3_prefix_list_id           = "pl-s3"
  staging_bucket_arn          = "arn:aws:s3:::staging"
  staging_kms_key_arn         = "arn:aws:kms:eu-west-1:123456789012:key/staging"
}

run "platform" {
  command = plan

  assert {
    condition     = output.postgres_host == "mock.rds" && output.postgres_replica_host == null
    error_message = "Development has one database and no replica to route to."
  }

  assert {
    condition     = length(output.postgres_member_hosts) == 0
    error_message = "A single instance must not pass for its own replica."
  }

  assert {
    condition     = output.warehouse_host == "mock.redshift-serverless" && output.warehouse_port == 5439
    error_message = "Development must use the serverless warehouse, on the same port."
  }

  assert {
    condition     = output.kafka_replication_factor == 2 && output.kafka_partitions == 8
    error_message = "The migration must learn how to make the topics."
  }
}

run "network" {
  command = plan

  module {
    source = "./modules/network"
  }

  variables {
    cidr                = var.vpc_cidr
    interface_endpoints = ["ecr.api", "ecr.dkr", "secretsmanager", "logs", "sts"]
  }

  assert {
    condition     = length(aws_nat_gateway.this) == 1 && length(aws_route.private_nat) == 3
    error_message = "One NAT gateway must serve all three zones."
  }

  assert {
    condition     = length(aws_subnet.private) == 3 && length(aws_subnet.data) == 3
    error_message = "Development spreads over three zones like production."
  }
}

run "postgres" {
  command = plan

  module {
    source = "./modules/postgres"
  }

  variables {
    settings = run.platform.settings.postgres
  }

  assert {
    condition     = length(aws_rds_cluster.this) == 0 && aws_db_instance.this[0].instance_class == "db.t4g.medium" && !aws_db_instance.this[0].multi_az
    error_message = "Development must be one small instance."
  }

  assert {
    condition     = aws_db_instance.this[0].storage_encrypted && aws_db_instance.this[0].kms_key_id == module.key.arn && !aws_db_instance.this[0].publicly_accessible
    error_message = "The instance must be encrypted and private."
  }

  assert {
    condition     = aws_db_instance.this[0].manage_master_user_password && aws_db_instance.this[0].password == null
    error_message = "RDS must make and keep the owner's password."
  }

  assert {
    condition     = aws_db_instance.this[0].backup_retention_period == 3 && !aws_db_instance.this[0].deletion_protection && aws_db_instance.this[0].skip_final_snapshot
    error_message = "Development keeps three days of backups and can be deleted."
  }

  assert {
    condition     = aws_db_instance.this[0].performance_insights_enabled && aws_db_instance.this[0].max_allocated_storage == 200
    error_message = "Performance Insights and growing storage must be on."
  }

  assert {
    condition     = alltrue([for line in ["rds.force_ssl=1", "synchronous_commit=on", "max_wal_size=4096", "min_wal_size=1024", "max_connections=200"] : contains([for parameter in aws_db_parameter_group.this[0].parameter : "${parameter.name}=${parameter.value}"], line)])
    error_message = "Development must run with production's parameters, scaled."
  }
}

run "kafka" {
  command = plan

  module {
    source = "./modules/kafka"
  }

  variables {
    settings = run.platform.settings.kafka
  }

  assert {
    condition     = aws_msk_cluster.this.number_of_broker_nodes == 2 && length(aws_msk_cluster.this.broker_node_group_info[0].client_subnets) == 2 && aws_msk_cluster.this.broker_node_group_info[0].instance_type == "kafka.t3.small"
    error_message = "Development must be two small brokers in two zones."
  }

  assert {
    condition     = aws_msk_cluster.this.encryption_info[0].encryption_in_transit[0].client_broker == "TLS" && aws_msk_cluster.this.client_authentication[0].sasl[0].iam && !aws_msk_cluster.this.client_authentication[0].unauthenticated
    error_message = "TLS and IAM hold in development too."
  }
}

run "warehouse" {
  command = plan

  module {
    source = "./modules/warehouse"
  }

  variables {
    settings = run.platform.settings.warehouse
  }

  assert {
    condition     = length(aws_redshift_cluster.this) == 0 && aws_redshiftserverless_workgroup.this[0].base_capacity == 8 && aws_redshiftserverless_workgroup.this[0].max_capacity == 16
    error_message = "Development must be the smallest serverless warehouse."
  }

  assert {
    condition     = !aws_redshiftserverless_workgroup.this[0].publicly_accessible && aws_redshiftserverless_workgroup.this[0].enhanced_vpc_routing && aws_redshiftserverless_namespace.this[0].kms_key_id == module.key.arn && aws_redshiftserverless_namespace.this[0].manage_admin_password
    error_message = "Serverless must be private, encrypted, and keep its own password."
  }

  assert {
    condition     = alltrue([for key in ["require_ssl", "enable_user_activity_logging"] : contains([for parameter in aws_redshiftserverless_workgroup.this[0].config_parameter : "${parameter.parameter_key}=${parameter.parameter_value}"], "${key}=true")])
    error_message = "Serverless must force TLS and audit statements."
  }

  assert {
    condition     = aws_redshiftserverless_usage_limit.compute[0].amount == 48 && aws_redshiftserverless_usage_limit.compute[0].breach_action == "deactivate"
    error_message = "A forgotten query must not run for a month."
  }
}

run "staging" {
  command = plan

  module {
    source = "./modules/staging"
  }

  variables {
    settings = run.platform.settings.staging
  }

  assert {
    condition     = aws_s3_bucket.this.force_destroy && aws_s3_bucket_public_access_block.this.restrict_public_buckets
    error_message = "Development's bucket can be deleted, and is private all the same."
  }

  assert {
    condition     = length(one([for rule in aws_s3_bucket_lifecycle_configuration.this.rule : rule if rule.id == "parquet"]).transition) == 0
    error_message = "Files kept for two weeks must not move to storage that bills thirty days."
  }
}

run "cluster" {
  command = plan

  module {
    source = "./modules/cluster"
  }

  variables {
    settings = run.platform.settings.cluster
  }

  assert {
    condition     = !aws_eks_cluster.this.vpc_config[0].endpoint_public_access && length(aws_eks_addon.container_insights) == 0
    error_message = "The API is private until addresses are named."
  }

  assert {
    condition     = aws_eks_node_group.this["general"].scaling_config[0].max_size == 4
    error_message = "Development must stay small."
  }
}

# Naming addresses opens the endpoint to exactly these.
run "cluster_with_named_addresses" {
  command = plan

  module {
    source = "./modules/cluster"
  }

  variables {
    settings = merge(run.platform.settings.cluster, { public_access_cidrs = ["203.0.113.7/32"] })
  }

  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].endpoint_public_access && toset(aws_eks_cluster.this.vpc_config[0].public_access_cidrs) == toset(["203.0.113.7/32"])
    error_message = "The endpoint must be open to the named address and no other."
  }
}

run "secrets" {
  command = plan

  module {
    source = "./modules/secrets"
  }

  variables {
    usernames        = { "postgres/ingest" = "atlasco_ingest" }
    password_version = 1
  }

  assert {
    condition     = aws_secretsmanager_secret.this["postgres/ingest"].recovery_window_in_days == 0
    error_message = "A deleted environment must free its secret names at once."
  }
}

run "observability" {
  command = plan

  module {
    source = "./modules/observability"
  }

  variables {
    nat_gateway_ids = { "eu-west-1a" = "nat-a" }

    postgres = {
      identifier            = "atlasco-dev"
      source_type           = "db-instance"
      instance_ids          = run.postgres.instance_ids
      has_standbys          = false
      max_connections       = 200
      allocated_storage_gib = 50
    }

    kafka = {
      cluster_name   = "atlasco-dev"
      broker_count   = 2
      changes_topic  = "atlasco.changes.v1"
      consumer_group = "atlasco-loader"
    }

    warehouse = { kind = "serverless", identifier = "atlasco-dev" }
  }

  assert {
    # One instance with six alarms; Kafka three and two per broker; one NAT gateway.
    condition     = length(aws_cloudwatch_metric_alarm.this) == 6 + 3 + 2 * 2 + 1
    error_message = "An alarm went missing, or came without being counted here."
  }

  assert {
    condition     = alltrue([for alarm in values(aws_cloudwatch_metric_alarm.this) : alarm.namespace != "AWS/Redshift" && alarm.metric_name != "ReplicaLag"])
    error_message = "Nothing may watch what development does not have."
  }

  assert {
    condition     = aws_db_event_subscription.this.source_type == "db-instance" && toset(aws_db_event_subscription.this.source_ids) == toset(["atlasco-dev"])
    error_message = "Database events must reach the topic."
  }
}
