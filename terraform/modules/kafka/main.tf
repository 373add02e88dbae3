# MSK with one door: TLS and IAM on port 9098. There is no plaintext listener, no SASL/SCRAM password and
# no anonymous client, so what a workload may do is written in its IAM role and nowhere else.

locals {
  zone_count = min(3, var.settings.broker_count)

  server_properties = {
    # The relay makes its topic with their partition count, which is fixed for their life; a typo
    # in a topic name must fail, not create.
    "auto.create.topics.enable"  = "false"
    "default.replication.factor" = var.settings.replication_factor
    # The relay writes with acks=all: a write is published once this many brokers have it.
    "min.insync.replicas" = var.settings.min_insync_replicas
    # A broker that lacks published records never becomes leader; the partition waits instead.
    "unclean.leader.election.enable" = "false"
    "num.partitions"                 = var.settings.partitions
    # How long the loader may be down before a gap opens that has to be reloaded from PostgreSQL.
    "log.retention.hours" = var.settings.retention_hours
    # The consumer's offsets outlive the records they point to, so a loader that comes back after a long
    # stop sees the gap and reports it; forgotten offsets would look like a first start.
    "offsets.retention.minutes"                = var.settings.retention_hours * 60 * 2
    "offsets.topic.replication.factor"         = var.settings.replication_factor
    "transaction.state.log.replication.factor" = var.settings.replication_factor
    "transaction.state.log.min.isr"            = var.settings.min_insync_replicas
    # Records are compressed once, by the relay.
    "compression.type" = "producer"
  }
}

module "key" {
  source = "../key"

  name        = "${var.name}-kafka"
  description = "Kafka ${var.name}: broker storage."
}

resource "aws_security_group" "this" {
  name        = "${var.name}-kafka"
  description = "Kafka brokers: TLS with IAM from the platform's workloads, none outwards."
  vpc_id      = var.vpc_id

  tags = { Name = "${var.name}-kafka" }
}

resource "aws_vpc_security_group_ingress_rule" "clients" {
  for_each = var.client_security_group_ids

  security_group_id            = aws_security_group.this.id
  description                  = "Kafka over TLS with IAM from ${each.key}."
  referenced_security_group_id = each.value
  ip_protocol                  = "tcp"
  from_port                    = 9098
  to_port                      = 9098
}

resource "aws_cloudwatch_log_group" "brokers" {
  name              = "/atlasco/${var.name}/kafka-brokers"
  retention_in_days = var.log_retention_days
  kms_key_id        = var.logs_kms_key_arn
}

resource "aws_msk_configuration" "this" {
  name           = var.name
  kafka_versions = [var.settings.version]

  server_properties = join("\n", [for key in sort(keys(local.server_properties)) : "${key}=${local.server_properties[key]}"])

  # The cluster refers to a revision of it; the new one must exist before the old is let go.
  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_msk_cluster" "this" {
  cluster_name           = var.name
  kafka_version          = var.settings.version
  number_of_broker_nodes = var.settings.broker_count
  enhanced_monitoring    = var.settings.enhanced_monitoring

  broker_node_group_info {
    instance_type   = var.settings.instance_type
    client_subnets  = slice(var.subnet_ids, 0, local.zone_count)
    security_groups = [aws_security_group.this.id]

    storage_info {
      ebs_storage_info {
        volume_size = var.settings.storage_gib
      }
    }

    connectivity_info {
      public_access {
        type = "DISABLED"
      }
    }
  }

  configuration_info {
    arn      = aws_msk_configuration.this.arn
    revision = aws_msk_configuration.this.latest_revision
  }

  client_authentication {
    unauthenticated = false

    sasl {
      iam   = true
      scram = false
    }
  }

  encryption_info {
    encryption_at_rest_kms_key_arn = module.key.arn

    encryption_in_transit {
      client_broker = "TLS"
      in_cluster    = true
    }
  }

  logging_info {
    broker_logs {
      cloudwatch_logs {
        enabled   = true
        log_group = aws_cloudwatch_log_group.brokers.name
      }
    }
  }

  lifecycle {
    # Storage grows by the policy below; Terraform must not try to shrink it again.
    ignore_changes = [broker_node_group_info[0].storage_info[0].ebs_storage_info[0].volume_size]

    precondition {
      condition     = var.settings.broker_count % local.zone_count == 0
      error_message = "kafka.broker_count must be 2 or a multiple of 3, so that every zone has the same number of brokers."
    }
  }
}

resource "aws_appautoscaling_target" "storage" {
  service_namespace  = "kafka"
  scalable_dimension = "kafka:broker-storage:VolumeSize"
  resource_id        = aws_msk_cluster.this.arn
  min_capacity       = 1
  max_capacity       = var.settings.max_storage_gib
}

resource "aws_appautoscaling_policy" "storage" {
  name               = "${var.name}-broker-storage"
  service_namespace  = aws_appautoscaling_target.storage.service_namespace
  scalable_dimension = aws_appautoscaling_target.storage.scalable_dimension
  resource_id        = aws_appautoscaling_target.storage.resource_id
  policy_type        = "TargetTrackingScaling"

  target_tracking_scaling_policy_configuration {
    # MSK cannot shrink a volume.
    disable_scale_in = true
    target_value     = 60

    predefined_metric_specification {
      predefined_metric_type = "KafkaBrokerStorageUtilization"
    }
  }
}
