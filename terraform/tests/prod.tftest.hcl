# What production must be, planned from prod.tfvars with a mocked provider:
#
#   terraform test -var-file=prod.tfvars -filter=tests/prod.tftest.hcl
#
# The first run plans the whole platform; the others plan one module each with the values prod.tfvars
# gives it, because only there can a test see the resources themselves.

mock_provider "aws" {
  source          = "./tests/mocks"
  override_during = plan
}

override_data {
  target = module.postgres.data.aws_db_instance.member[0]
  values = { address = "mock-instance-1.rds" }
}

override_data {
  target = module.postgres.data.aws_db_instance.member[1]
  values = { address = "mock-instance-2.rds" }
}

override_data {
  target = module.postgres.data.aws_db_instance.member[2]
  values = { address = "mock-instance-3.rds" }
}

variables {
  alert_emails = ["oncall@atlasco.test"]

  # Inputs of single modules.
  name                        = "atlasco-prod"
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
    condition     = output.postgres_host == "mock.cluster.rds" && output.postgres_replica_host == "mock.cluster-ro.rds"
    error_message = "Production must offer a host for writing and one for reading."
  }

  # In the order of their names, each once; the mock's own values would be one and the same for all.
  assert {
    condition     = tolist(output.postgres_member_hosts) == tolist(["mock-instance-1.rds", "mock-instance-2.rds", "mock-instance-3.rds"])
    error_message = "Gateways need the address of each member: a replica is one server that proves its own freshness."
  }

  assert {
    condition     = output.warehouse_host == "mock.redshift"
    error_message = "Production must use the provisioned warehouse."
  }

  assert {
    condition = toset(keys(output.role_arns)) == toset([
      "gateway", "relay", "loader", "rollup", "migrate", "maintain", "load-balancer", "external-secrets", "autoscaler",
    ])
    error_message = "Every workload and controller must have a role."
  }

  assert {
    condition = alltrue([
      for workload in ["gateway", "relay", "loader", "rollup", "migrate", "maintain"] :
      output.service_accounts[workload] == { namespace = "atlasco", service_account = "atlasco-${workload}" }
    ])
    error_message = "Service accounts must be atlasco/atlasco-<workload>: the manifests use these names."
  }

  assert {
    condition     = output.kafka_topics == { changes = "atlasco.changes.v1", dead_letter = "atlasco.changes.v1.dead-letter", consumer_group = "atlasco-loader" }
    error_message = "Topic and group names are the program's contract."
  }

  assert {
    condition = output.secret_names == {
      postgres_ingest  = "atlasco-prod/postgres/ingest"
      postgres_query   = "atlasco-prod/postgres/query"
      postgres_relay   = "atlasco-prod/postgres/relay"
      postgres_loader  = "atlasco-prod/postgres/loader"
      postgres_rollup  = "atlasco-prod/postgres/rollup"
      warehouse_loader = "atlasco-prod/warehouse/loader"
      warehouse_reader = "atlasco-prod/warehouse/reader"
    }
    error_message = "Secrets must have names the manifests can predict."
  }

  assert {
    condition     = length(output.secret_arns) == 9 && alltrue([for arn in values(output.secret_arns) : startswith(arn, "arn:aws:secretsmanager:")])
    error_message = "Every secret must be in Secrets Manager."
  }
}

# A placeholder address in prod.tfvars warns on every plan.
run "placeholder_address_warns" {
  command = plan

  variables {
    alert_emails = ["oncall@atlasco.example"]
  }

  expect_failures = [check.alerts_reach_someone]
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
    condition     = length(aws_subnet.private) == 3 && length(aws_subnet.data) == 3 && length(aws_subnet.public) == 3
    error_message = "Each tier must have a subnet in three zones."
  }

  assert {
    condition     = length(aws_nat_gateway.this) == 3
    error_message = "Production needs a NAT gateway in each zone."
  }

  assert {
    condition     = alltrue([for subnet in concat(values(aws_subnet.public), values(aws_subnet.private), values(aws_subnet.data)) : subnet.map_public_ip_on_launch != true])
    error_message = "No subnet may hand out public addresses."
  }

  assert {
    condition     = length([for route in values(aws_route.private_nat) : route if route.gateway_id != null]) == 0
    error_message = "Private subnets must not route to the internet gateway."
  }

  assert {
    condition     = aws_vpc_endpoint.s3.vpc_endpoint_type == "Gateway" && toset(keys(aws_vpc_endpoint.interface)) == toset(["ecr.api", "ecr.dkr", "secretsmanager", "logs", "sts"])
    error_message = "S3, ECR, Secrets Manager, Logs and STS must be reached inside the VPC."
  }

  assert {
    condition = alltrue([
      for endpoint in values(aws_vpc_endpoint.interface) : endpoint.private_dns_enabled &&
      jsondecode(endpoint.policy).Statement[0].Condition.StringEquals["aws:PrincipalAccount"] == "123456789012"
    ])
    error_message = "Endpoints must serve this account's principals only, under their usual names."
  }

  assert {
    condition     = aws_flow_log.this.traffic_type == "ALL" && aws_cloudwatch_log_group.flow.retention_in_days >= 365 && aws_cloudwatch_log_group.flow.kms_key_id == var.logs_kms_key_arn
    error_message = "Flow logs must cover all traffic, encrypted, for a year."
  }

  assert {
    condition     = aws_vpc_security_group_ingress_rule.endpoints_tls.cidr_ipv4 == var.vpc_cidr && aws_vpc_security_group_ingress_rule.endpoints_tls.from_port == 443
    error_message = "Endpoints must accept TLS from the VPC only."
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
    condition     = length(aws_db_instance.this) == 0 && aws_rds_cluster.this[0].db_cluster_instance_class == "db.r6gd.2xlarge" && aws_rds_cluster.this[0].engine == "postgres"
    error_message = "Production must be a Multi-AZ DB cluster of PostgreSQL."
  }

  assert {
    condition     = aws_rds_cluster.this[0].storage_encrypted && aws_rds_cluster.this[0].kms_key_id == module.key.arn
    error_message = "Storage must be encrypted with the database's own key."
  }

  assert {
    condition     = aws_rds_cluster.this[0].manage_master_user_password && aws_rds_cluster.this[0].master_password == null && aws_rds_cluster.this[0].master_user_secret_kms_key_id == module.key.arn
    error_message = "RDS must make and keep the owner's password."
  }

  assert {
    condition     = aws_rds_cluster.this[0].backup_retention_period == 35 && aws_rds_cluster.this[0].deletion_protection && !aws_rds_cluster.this[0].skip_final_snapshot && !aws_rds_cluster.this[0].delete_automated_backups && aws_rds_cluster.this[0].copy_tags_to_snapshot
    error_message = "Production needs 35 days of point-in-time recovery, deletion protection and a final snapshot."
  }

  assert {
    condition     = aws_rds_cluster.this[0].performance_insights_enabled && aws_rds_cluster.this[0].performance_insights_kms_key_id == module.key.arn && aws_rds_cluster.this[0].monitoring_interval == 15
    error_message = "Performance Insights and enhanced monitoring must be on."
  }

  assert {
    condition     = aws_rds_cluster.this[0].storage_type == "io2" && aws_rds_cluster.this[0].iops == 12000 && aws_rds_cluster.this[0].allocated_storage == 6000
    error_message = "Storage of production must be provisioned."
  }

  assert {
    condition     = alltrue([for name, value in { "rds.force_ssl" = "1", "synchronous_commit" = "on", "password_encryption" = "scram-sha-256", "max_wal_size" = "32768", "max_connections" = "1300" } : contains([for parameter in aws_rds_cluster_parameter_group.this[0].parameter : "${parameter.name}=${parameter.value}"], "${name}=${value}")])
    error_message = "The parameter group must force TLS, keep commits durable and size the log."
  }

  assert {
    condition     = aws_rds_cluster_parameter_group.this[0].family == "postgres17"
    error_message = "The parameter group must match the engine version."
  }

  assert {
    condition     = length(aws_vpc_security_group_ingress_rule.clients) == 1 && aws_vpc_security_group_ingress_rule.clients["cluster"].referenced_security_group_id == "sg-cluster" && aws_vpc_security_group_ingress_rule.clients["cluster"].from_port == 5432 && aws_vpc_security_group_ingress_rule.clients["cluster"].cidr_ipv4 == null
    error_message = "Only the cluster's security group may connect."
  }

  assert {
    condition     = alltrue([for group in values(aws_cloudwatch_log_group.this) : group.kms_key_id == var.logs_kms_key_arn && startswith(group.name, "/aws/rds/cluster/atlasco-prod/")])
    error_message = "Database logs must land in encrypted groups under the name RDS uses."
  }
}

# Each member is asked for by the name that the cluster gives it, none by a guess.
run "postgres_members" {
  command = plan

  module {
    source = "./modules/postgres"
  }

  variables {
    settings = run.platform.settings.postgres
  }

  override_resource {
    target          = aws_rds_cluster.this
    override_during = plan
    values = {
      cluster_members    = ["b", "a"]
      master_user_secret = [{ secret_arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:rds-owner" }]
    }
  }

  override_data {
    target = data.aws_db_instance.member[0]
    values = { address = "a.rds" }
  }

  override_data {
    target = data.aws_db_instance.member[1]
    values = { address = "b.rds" }
  }

  override_data {
    target = data.aws_db_instance.member[2]
    values = { address = "a.rds" }
  }

  assert {
    condition     = [for member in data.aws_db_instance.member : member.db_instance_identifier] == ["a", "b", "a"]
    error_message = "While a member is being replaced a plan must still be possible, with those that are there."
  }

  assert {
    condition     = tolist(output.member_hosts) == tolist(["a.rds", "b.rds"])
    error_message = "A member must not be named twice: it would pass for two replicas."
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
    condition     = aws_msk_cluster.this.number_of_broker_nodes == 3 && length(aws_msk_cluster.this.broker_node_group_info[0].client_subnets) == 3
    error_message = "Brokers must spread over three zones."
  }

  assert {
    condition     = aws_msk_cluster.this.encryption_info[0].encryption_in_transit[0].client_broker == "TLS" && aws_msk_cluster.this.encryption_info[0].encryption_in_transit[0].in_cluster && aws_msk_cluster.this.encryption_info[0].encryption_at_rest_kms_key_arn == module.key.arn
    error_message = "Kafka must be encrypted in transit and at rest."
  }

  assert {
    condition     = aws_msk_cluster.this.client_authentication[0].sasl[0].iam && !aws_msk_cluster.this.client_authentication[0].unauthenticated && !aws_msk_cluster.this.client_authentication[0].sasl[0].scram
    error_message = "IAM must be the only way to log in."
  }

  assert {
    condition     = aws_msk_cluster.this.broker_node_group_info[0].connectivity_info[0].public_access[0].type == "DISABLED"
    error_message = "Brokers must not be public."
  }

  assert {
    condition = alltrue([
      for line in ["min.insync.replicas=2", "default.replication.factor=3", "unclean.leader.election.enable=false", "auto.create.topics.enable=false", "offsets.retention.minutes=20160"] :
      contains(split("\n", aws_msk_configuration.this.server_properties), line)
    ])
    error_message = "Published must mean held by two brokers, and topics must not create themselves."
  }

  assert {
    condition     = aws_msk_cluster.this.logging_info[0].broker_logs[0].cloudwatch_logs[0].enabled && aws_appautoscaling_target.storage.max_capacity == 4000
    error_message = "Broker logs and growing storage must be on."
  }

  assert {
    condition     = aws_vpc_security_group_ingress_rule.clients["cluster"].from_port == 9098 && aws_vpc_security_group_ingress_rule.clients["cluster"].to_port == 9098
    error_message = "Only the TLS port with IAM may be open."
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
    condition     = length(aws_redshiftserverless_workgroup.this) == 0 && aws_redshift_cluster.this[0].node_type == "ra3.xlplus" && aws_redshift_cluster.this[0].number_of_nodes == 2
    error_message = "Production must be a provisioned RA3 cluster of two nodes."
  }

  assert {
    condition     = tobool(aws_redshift_cluster.this[0].encrypted) && aws_redshift_cluster.this[0].kms_key_id == module.key.arn && !aws_redshift_cluster.this[0].publicly_accessible && aws_redshift_cluster.this[0].enhanced_vpc_routing
    error_message = "The warehouse must be encrypted, private, and load through the VPC."
  }

  assert {
    condition     = aws_redshift_cluster.this[0].manage_master_password && aws_redshift_cluster.this[0].master_password == null
    error_message = "Redshift must make and keep the administrator's password."
  }

  assert {
    condition     = aws_redshift_cluster.this[0].automated_snapshot_retention_period == 35 && !aws_redshift_cluster.this[0].skip_final_snapshot
    error_message = "Production needs 35 days of snapshots and a final one."
  }

  assert {
    condition     = alltrue([for name in ["require_ssl", "enable_user_activity_logging"] : contains([for parameter in aws_redshift_parameter_group.this[0].parameter : "${parameter.name}=${parameter.value}"], "${name}=true")])
    error_message = "The warehouse must force TLS and audit statements."
  }

  assert {
    condition     = [for queue in jsondecode(one([for parameter in aws_redshift_parameter_group.this[0].parameter : parameter.value if parameter.name == "wlm_json_configuration"])) : try(queue.priority, "short")] == ["highest", "normal", "low", "short"]
    error_message = "Loading must come before reading, and reading before the rest."
  }

  assert {
    condition     = toset(aws_redshift_logging.this[0].log_exports) == toset(["connectionlog", "userlog", "useractivitylog"]) && alltrue([for group in values(aws_cloudwatch_log_group.audit) : group.retention_in_days >= 365 && startswith(group.name, "/aws/redshift/cluster/atlasco-prod/")])
    error_message = "Audit logs must be complete and kept for a year."
  }

  # Gateways query it, loaders load it: both from the cluster, on the one port.
  assert {
    condition     = length(aws_vpc_security_group_ingress_rule.clients) == 1 && aws_vpc_security_group_ingress_rule.clients["cluster"].referenced_security_group_id == "sg-cluster" && aws_vpc_security_group_ingress_rule.clients["cluster"].from_port == 5439 && aws_vpc_security_group_ingress_rule.clients["cluster"].to_port == 5439 && aws_vpc_security_group_ingress_rule.clients["cluster"].cidr_ipv4 == null
    error_message = "Only the cluster's security group may connect to the warehouse."
  }

  assert {
    condition     = aws_vpc_security_group_egress_rule.s3.prefix_list_id == "pl-s3" && aws_vpc_security_group_egress_rule.s3.cidr_ipv4 == null
    error_message = "The warehouse may reach S3 and the endpoints, nothing else."
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
    condition     = !aws_s3_bucket.this.force_destroy && aws_s3_bucket_versioning.this.versioning_configuration[0].status == "Enabled"
    error_message = "Production's files must survive a mistake."
  }

  assert {
    condition     = alltrue([for access in [aws_s3_bucket_public_access_block.this, aws_s3_bucket_public_access_block.access_logs] : access.block_public_acls && access.block_public_policy && access.ignore_public_acls && access.restrict_public_buckets])
    error_message = "Both buckets must be private."
  }

  assert {
    condition     = one(aws_s3_bucket_server_side_encryption_configuration.this.rule).apply_server_side_encryption_by_default[0].sse_algorithm == "aws:kms" && one(aws_s3_bucket_server_side_encryption_configuration.this.rule).apply_server_side_encryption_by_default[0].kms_master_key_id == module.key.arn
    error_message = "Files must be encrypted with the bucket's own key."
  }

  assert {
    condition     = contains([for statement in jsondecode(aws_s3_bucket_policy.this.policy).Statement : "${statement.Effect} ${try(statement.Condition.Bool["aws:SecureTransport"], "")}"], "Deny false")
    error_message = "The bucket must refuse requests without TLS."
  }

  assert {
    condition     = one([for rule in aws_s3_bucket_lifecycle_configuration.this.rule : rule if rule.id == "parquet"]).expiration[0].days == 400 && length(one([for rule in aws_s3_bucket_lifecycle_configuration.this.rule : rule if rule.id == "parquet"]).transition) == 1
    error_message = "Parquet must be kept 400 days and move to cheaper storage."
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
    condition     = aws_eks_cluster.this.vpc_config[0].endpoint_private_access && !aws_eks_cluster.this.vpc_config[0].endpoint_public_access
    error_message = "The Kubernetes API must be private."
  }

  assert {
    condition     = aws_eks_cluster.this.encryption_config[0].provider[0].key_arn == module.key.arn && toset(aws_eks_cluster.this.enabled_cluster_log_types) == toset(["api", "audit", "authenticator", "controllerManager", "scheduler"])
    error_message = "Kubernetes secrets must be encrypted and the control plane logged."
  }

  assert {
    condition     = aws_eks_cluster.this.access_config[0].authentication_mode == "API"
    error_message = "Access must be by access entries only."
  }

  assert {
    condition     = alltrue([for template in values(aws_launch_template.node) : template.metadata_options[0].http_tokens == "required" && template.metadata_options[0].http_put_response_hop_limit == 1 && tobool(template.block_device_mappings[0].ebs[0].encrypted)])
    error_message = "Pods must not reach the node's credentials, and node disks must be encrypted."
  }

  assert {
    condition     = toset(keys(aws_eks_node_group.this)) == toset(["gateway", "general"]) && alltrue([for group in values(aws_eks_node_group.this) : group.scaling_config[0].min_size >= 3 && group.capacity_type == "ON_DEMAND"])
    error_message = "Production needs at least three on-demand nodes in each group."
  }

  assert {
    condition     = jsondecode(aws_eks_addon.before_nodes["vpc-cni"].configuration_values).enableNetworkPolicy == "true" && contains(keys(aws_eks_addon.before_nodes), "eks-pod-identity-agent") && contains(keys(aws_eks_addon.after_nodes), "metrics-server")
    error_message = "Network policies, Pod Identity and the metrics server must be installed."
  }

  assert {
    condition     = length(aws_eks_addon.container_insights) == 1
    error_message = "Production must send container logs to CloudWatch."
  }
}

run "registry" {
  command = plan

  module {
    source = "./modules/registry"
  }

  variables {
    kept_images = 30
  }

  assert {
    condition     = aws_ecr_repository.this.image_tag_mutability == "IMMUTABLE" && aws_ecr_repository.this.image_scanning_configuration[0].scan_on_push && aws_ecr_repository.this.encryption_configuration[0].encryption_type == "KMS" && !aws_ecr_repository.this.force_delete
    error_message = "Images must be immutable, scanned, encrypted and kept."
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
    condition     = aws_secretsmanager_secret.this["postgres/ingest"].recovery_window_in_days == 30 && aws_secretsmanager_secret.this["postgres/ingest"].kms_key_id == module.key.arn
    error_message = "Secrets must be recoverable and encrypted with their own key."
  }

  assert {
    condition     = aws_secretsmanager_secret_version.this["postgres/ingest"].secret_string_wo == null && aws_secretsmanager_secret_version.this["postgres/ingest"].secret_string_wo_version == 1
    error_message = "The value must be write-only: absent from plan and state."
  }
}

run "observability" {
  command = plan

  module {
    source = "./modules/observability"
  }

  variables {
    nat_gateway_ids            = { "eu-west-1a" = "nat-a", "eu-west-1b" = "nat-b", "eu-west-1c" = "nat-c" }
    container_insights_cluster = "atlasco-prod"

    postgres = {
      identifier            = "atlasco-prod"
      source_type           = "db-cluster"
      instance_ids          = run.postgres.instance_ids
      has_standbys          = true
      max_connections       = 500
      allocated_storage_gib = 2000
    }

    kafka = {
      cluster_name   = "atlasco-prod"
      broker_count   = 3
      changes_topic  = "atlasco.changes.v1"
      consumer_group = "atlasco-loader"
    }

    warehouse = { kind = "cluster", identifier = "atlasco-prod" }
  }

  assert {
    # Three instances with six alarms and a lag alarm each; Kafka three and two per broker; warehouse
    # three; one per NAT gateway; one for nodes.
    condition     = length(aws_cloudwatch_metric_alarm.this) == 3 * 7 + 3 + 3 * 2 + 3 + 3 + 1
    error_message = "An alarm went missing, or came without being counted here."
  }

  assert {
    condition     = alltrue([for alarm in values(aws_cloudwatch_metric_alarm.this) : tolist(alarm.alarm_actions) == tolist([aws_sns_topic.alerts.arn]) && length(alarm.alarm_description) > 60])
    error_message = "Every alarm must reach the topic and say what to do."
  }

  assert {
    condition     = aws_cloudwatch_metric_alarm.this["postgres-replica-lag-atlasco-prod-instance-3"].threshold == 10 && aws_cloudwatch_metric_alarm.this["kafka-loader-lag"].dimensions["Consumer Group"] == "atlasco-loader"
    error_message = "Lag of standbys and of the loader must be watched."
  }

  assert {
    condition     = aws_cloudwatch_metric_alarm.this["postgres-storage-atlasco-prod-instance-1"].threshold == 429496729600
    error_message = "The storage alarm must ring at 20% of what was allocated."
  }

  assert {
    condition     = aws_sns_topic.alerts.kms_master_key_id == module.key.arn && keys(aws_sns_topic_subscription.email) == ["oncall@atlasco.test"]
    error_message = "The topic must be encrypted and have a reader."
  }

  assert {
    condition     = length(aws_budgets_budget.this.notification) == 2 && aws_budgets_budget.this.limit_amount == "18000"
    error_message = "The budget must warn on cost reached and on cost foreseen."
  }
}

# Least privilege, read from the policies themselves.
run "identities" {
  command = plan

  module {
    source = "./modules/identities"
  }

  variables {
    cluster_name = "atlasco-prod"
    cluster_arn  = "arn:aws:eks:eu-west-1:123456789012:cluster/atlasco-prod"
    namespace    = "atlasco"

    secrets = {
      postgres_owner   = { arn = "arn:s:owner", kms_key_arn = "arn:k:postgres" }
      postgres_ingest  = { arn = "arn:s:ingest", kms_key_arn = "arn:k:secrets" }
      postgres_query   = { arn = "arn:s:query", kms_key_arn = "arn:k:secrets" }
      postgres_relay   = { arn = "arn:s:relay", kms_key_arn = "arn:k:secrets" }
      postgres_loader  = { arn = "arn:s:loader", kms_key_arn = "arn:k:secrets" }
      postgres_rollup  = { arn = "arn:s:rollup", kms_key_arn = "arn:k:secrets" }
      warehouse_loader = { arn = "arn:s:warehouse-loader", kms_key_arn = "arn:k:secrets" }
      warehouse_reader = { arn = "arn:s:warehouse-reader", kms_key_arn = "arn:k:secrets" }
    }

    kafka = {
      cluster_arn       = "arn:aws:kafka:eu-west-1:123456789012:cluster/atlasco-prod/abcd-1"
      changes_topic     = "atlasco.changes.v1"
      dead_letter_topic = "atlasco.changes.v1.dead-letter"
      consumer_group    = "atlasco-loader"
      tool_groups       = ["atlasco-redrive", "atlasco-rebuild", "atlasco-verify"]
    }

    staging = { bucket_arn = "arn:aws:s3:::staging", kms_key_arn = "arn:k:staging" }
  }

  assert {
    condition = jsonencode({
      for workload in ["gateway", "relay", "loader", "rollup", "migrate", "maintain"] : workload =>
      sort([for arn in jsondecode(output.policies[workload]).Statement[0].Resource : trimprefix(arn, "arn:s:")])
      }) == jsonencode({
      gateway  = ["ingest", "query", "warehouse-reader"]
      relay    = ["relay"]
      loader   = ["loader", "warehouse-loader"]
      rollup   = ["rollup"]
      migrate  = ["ingest", "loader", "owner", "query", "relay", "rollup"]
      maintain = ["owner"]
    })
    error_message = "A workload reads secrets it should not, or lacks one it needs."
  }

  assert {
    condition = jsonencode({
      for workload in ["gateway", "relay", "loader", "rollup", "migrate", "maintain"] : workload =>
      sort(distinct([for action in flatten([for statement in jsondecode(output.policies[workload]).Statement : statement.Action]) : action if startswith(action, "kafka-cluster:Write") || startswith(action, "kafka-cluster:Read") || startswith(action, "kafka-cluster:Create") || startswith(action, "s3:Put") || startswith(action, "s3:Delete")]))
      }) == jsonencode({
      gateway  = []
      relay    = ["kafka-cluster:CreateTopic", "kafka-cluster:WriteData", "kafka-cluster:WriteDataIdempotently"]
      loader   = ["kafka-cluster:CreateTopic", "kafka-cluster:ReadData", "kafka-cluster:WriteData", "kafka-cluster:WriteDataIdempotently", "s3:DeleteObject", "s3:PutObject"]
      rollup   = []
      migrate  = []
      maintain = []
    })
    error_message = "A workload may move data it should not, or may not move data it must."
  }

  # Both of the gateway's logins have passwords: a right to make credentials would be one more way in.
  assert {
    condition = alltrue([
      for identity, policy in output.policies : alltrue([
        for action in flatten([for statement in jsondecode(policy).Statement : statement.Action]) :
        !startswith(action, "redshift") && !startswith(action, "rds-db:")
      ])
    ])
    error_message = "No identity may make database credentials: logins have passwords, from Secrets Manager."
  }

  assert {
    condition     = toset(flatten([for statement in jsondecode(output.policies["gateway"]).Statement : statement.Action])) == toset(["secretsmanager:GetSecretValue", "secretsmanager:DescribeSecret", "kms:Decrypt"])
    error_message = "The gateway reads its secrets, and does nothing else in AWS: the warehouse's bucket is the loader's."
  }

  assert {
    condition     = one([for statement in jsondecode(output.policies["relay"]).Statement : statement.Resource if statement.Sid == "PublishChanges"]) == "arn:aws:kafka:eu-west-1:123456789012:topic/atlasco-prod/abcd-1/atlasco.changes.v1"
    error_message = "The relay must be bound to the changes topic."
  }

  # Each right in Kafka, by the last part of what it is a right to.
  assert {
    condition = jsonencode({
      for workload in ["relay", "loader"] : workload => sort(distinct(flatten([
        for statement in jsondecode(output.policies[workload]).Statement : [
          for resource in flatten([statement.Resource]) : [
            for action in statement.Action : "${basename(resource)} ${trimprefix(action, "kafka-cluster:")}"
          ]
        ] if contains(["PublishChanges", "ConsumeChanges", "DeadLetters", "Groups"], statement.Sid)
      ])))
      }) == jsonencode({
      relay = [
        "atlasco.changes.v1 CreateTopic", "atlasco.changes.v1 DescribeTopic",
        "atlasco.changes.v1 DescribeTopicDynamicConfiguration", "atlasco.changes.v1 WriteData",
      ]
      loader = [
        "atlasco-loader AlterGroup", "atlasco-loader DescribeGroup",
        "atlasco-rebuild AlterGroup", "atlasco-rebuild DescribeGroup",
        "atlasco-redrive AlterGroup", "atlasco-redrive DescribeGroup",
        "atlasco-verify AlterGroup", "atlasco-verify DescribeGroup",
        "atlasco.changes.v1 DescribeTopic", "atlasco.changes.v1 DescribeTopicDynamicConfiguration",
        "atlasco.changes.v1 ReadData",
        "atlasco.changes.v1.dead-letter CreateTopic", "atlasco.changes.v1.dead-letter DescribeTopic",
        "atlasco.changes.v1.dead-letter DescribeTopicDynamicConfiguration",
        "atlasco.changes.v1.dead-letter ReadData", "atlasco.changes.v1.dead-letter WriteData",
      ]
    })
    error_message = "Relay and loader must make, read and write their topics, and nothing else in Kafka."
  }

  assert {
    condition = alltrue([
      for workload in ["gateway", "relay", "loader", "rollup", "migrate", "maintain"] : alltrue([
        for action in flatten([for statement in jsondecode(output.policies[workload]).Statement : statement.Action]) :
        !contains(["kafka-cluster:AlterTopic", "kafka-cluster:DeleteTopic", "kafka-cluster:AlterTopicDynamicConfiguration", "kafka-cluster:AlterCluster"], action)
      ])
    ])
    error_message = "No workload may change or delete a topic."
  }

  assert {
    condition = alltrue([
      for workload in ["gateway", "relay", "loader", "rollup", "migrate", "maintain"] : alltrue([
        for statement in jsondecode(output.policies[workload]).Statement : alltrue([
          for resource in flatten([statement.Resource]) : resource != "*"
        ]) && alltrue([for action in statement.Action : !endswith(action, "*")])
      ])
    ])
    error_message = "No workload may have a wildcard action or resource."
  }

  assert {
    condition = alltrue([
      for identity, role in aws_iam_role.this :
      jsondecode(role.assume_role_policy).Statement[0].Condition.StringEquals["aws:RequestTag/eks-cluster-arn"] == var.cluster_arn &&
      jsondecode(role.assume_role_policy).Statement[0].Condition.StringEquals["aws:RequestTag/kubernetes-service-account"] == aws_eks_pod_identity_association.this[identity].service_account
    ])
    error_message = "A role must be usable by its own service account of this cluster only."
  }
}
