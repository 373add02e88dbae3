# RDS for PostgreSQL, in one of two topologies:
#   instance           one instance in one zone, storage that grows by itself
#   multi_az_cluster   one writer and two readable standbys in three zones; a commit waits until a
#                      standby has the log, failover promotes a standby that is already running

data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}

locals {
  is_cluster = var.settings.topology == "multi_az_cluster"

  # RDS names the members of a Multi-AZ DB cluster itself. Alarms need the names before they exist.
  instance_ids = local.is_cluster ? [for number in [1, 2, 3] : "${var.name}-instance-${number}"] : [var.name]

  # The members as RDS knows them. While one is being replaced there are fewer: a plan must still be possible then.
  members = local.is_cluster ? sort(tolist(aws_rds_cluster.this[0].cluster_members)) : []

  log_source = local.is_cluster ? "cluster" : "instance"
  log_types  = toset(["postgresql", "upgrade"])
}

module "key" {
  source = "../key"

  name        = "${var.name}-postgres"
  description = "PostgreSQL ${var.name}: storage, backups, Performance Insights and the owner's password."
}

resource "aws_db_subnet_group" "this" {
  name        = var.name
  description = "Subnets without a route out."
  subnet_ids  = var.subnet_ids
}

resource "aws_security_group" "this" {
  name        = "${var.name}-postgres"
  description = "PostgreSQL: connections from the platform's workloads, none outwards."
  vpc_id      = var.vpc_id

  tags = { Name = "${var.name}-postgres" }
}

resource "aws_vpc_security_group_ingress_rule" "clients" {
  for_each = var.client_security_group_ids

  security_group_id            = aws_security_group.this.id
  description                  = "PostgreSQL from ${each.key}."
  referenced_security_group_id = each.value
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432
}

# Made before the database: a log group that RDS creates on its own is unencrypted and never expires.
resource "aws_cloudwatch_log_group" "this" {
  for_each = local.log_types

  name              = "/aws/rds/${local.log_source}/${var.name}/${each.key}"
  retention_in_days = var.log_retention_days
  kms_key_id        = var.logs_kms_key_arn
}

resource "aws_iam_role" "monitoring" {
  name = "${var.name}-rds-monitoring"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "monitoring.rds.amazonaws.com" }
      Action    = "sts:AssumeRole"
      Condition = { StringEquals = { "aws:SourceAccount" = data.aws_caller_identity.current.account_id } }
    }]
  })
}

resource "aws_iam_role_policy_attachment" "monitoring" {
  role       = aws_iam_role.monitoring.name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/service-role/AmazonRDSEnhancedMonitoringRole"
}

resource "aws_db_instance" "this" {
  #checkov:skip=CKV_AWS_157:The single-instance topology is for environments that may lose an hour; production is required to use the Multi-AZ DB cluster below.
  #checkov:skip=CKV_AWS_293:Deletion protection follows the variable deletion_protection, which production is required to set.
  #checkov:skip=CKV_AWS_161:Workloads log in with SCRAM passwords from Secrets Manager; IAM tokens limit new connections per second, which a mass reconnect of gateways exceeds.
  count = local.is_cluster ? 0 : 1

  identifier     = var.name
  engine         = "postgres"
  engine_version = var.settings.engine_version
  instance_class = var.settings.instance_class

  storage_type          = var.settings.storage_type
  allocated_storage     = var.settings.allocated_storage_gib
  max_allocated_storage = var.settings.max_allocated_storage_gib
  iops                  = var.settings.iops > 0 ? var.settings.iops : null
  storage_encrypted     = true
  kms_key_id            = module.key.arn

  db_name                       = var.settings.database_name
  username                      = var.settings.owner_username
  manage_master_user_password   = true
  master_user_secret_kms_key_id = module.key.arn

  db_subnet_group_name   = aws_db_subnet_group.this.name
  vpc_security_group_ids = [aws_security_group.this.id]
  publicly_accessible    = false
  multi_az               = false
  port                   = 5432

  parameter_group_name        = aws_db_parameter_group.this[0].name
  auto_minor_version_upgrade  = true
  allow_major_version_upgrade = false
  apply_immediately           = var.settings.apply_immediately
  maintenance_window          = var.settings.preferred_maintenance_window

  # A retention above zero is what turns on point-in-time recovery.
  backup_retention_period   = var.settings.backup_retention_days
  backup_window             = var.settings.preferred_backup_window
  copy_tags_to_snapshot     = true
  delete_automated_backups  = !var.deletion_protection
  deletion_protection       = var.deletion_protection
  skip_final_snapshot       = !var.deletion_protection
  final_snapshot_identifier = var.deletion_protection ? "${var.name}-final" : null

  performance_insights_enabled          = true
  performance_insights_kms_key_id       = module.key.arn
  performance_insights_retention_period = var.settings.performance_insights_days
  monitoring_interval                   = var.settings.monitoring_interval_seconds
  monitoring_role_arn                   = aws_iam_role.monitoring.arn
  enabled_cloudwatch_logs_exports       = local.log_types

  depends_on = [aws_cloudwatch_log_group.this, aws_iam_role_policy_attachment.monitoring]

  lifecycle {
    precondition {
      condition     = var.settings.max_allocated_storage_gib > var.settings.allocated_storage_gib
      error_message = "postgres.max_allocated_storage_gib must exceed allocated_storage_gib, or storage cannot grow before it is full."
    }
  }
}

resource "aws_rds_cluster" "this" {
  #checkov:skip=CKV_AWS_139:Deletion protection follows the variable deletion_protection, which production is required to set.
  #checkov:skip=CKV_AWS_162:Workloads log in with SCRAM passwords from Secrets Manager; IAM tokens limit new connections per second, which a mass reconnect of gateways exceeds.
  #checkov:skip=CKV2_AWS_27:log_statement and log_min_duration_statement are set in parameters.tf; the check does not see through the dynamic block.
  #checkov:skip=CKV2_AWS_8:Automated backups with point-in-time recovery are on; a plan in AWS Backup would be a second copy of the same snapshots in the same region.
  count = local.is_cluster ? 1 : 0

  cluster_identifier        = var.name
  engine                    = "postgres"
  engine_version            = var.settings.engine_version
  db_cluster_instance_class = var.settings.instance_class

  storage_type      = var.settings.storage_type
  allocated_storage = var.settings.allocated_storage_gib
  iops              = var.settings.iops
  storage_encrypted = true
  kms_key_id        = module.key.arn

  database_name                 = var.settings.database_name
  master_username               = var.settings.owner_username
  manage_master_user_password   = true
  master_user_secret_kms_key_id = module.key.arn

  db_subnet_group_name   = aws_db_subnet_group.this.name
  vpc_security_group_ids = [aws_security_group.this.id]
  port                   = 5432

  db_cluster_parameter_group_name = aws_rds_cluster_parameter_group.this[0].name
  allow_major_version_upgrade     = false
  apply_immediately               = var.settings.apply_immediately
  preferred_maintenance_window    = var.settings.preferred_maintenance_window

  backup_retention_period   = var.settings.backup_retention_days
  preferred_backup_window   = var.settings.preferred_backup_window
  copy_tags_to_snapshot     = true
  delete_automated_backups  = !var.deletion_protection
  deletion_protection       = var.deletion_protection
  skip_final_snapshot       = !var.deletion_protection
  final_snapshot_identifier = var.deletion_protection ? "${var.name}-final" : null

  performance_insights_enabled          = true
  performance_insights_kms_key_id       = module.key.arn
  performance_insights_retention_period = var.settings.performance_insights_days
  monitoring_interval                   = var.settings.monitoring_interval_seconds
  monitoring_role_arn                   = aws_iam_role.monitoring.arn
  enabled_cloudwatch_logs_exports       = local.log_types

  depends_on = [aws_cloudwatch_log_group.this, aws_iam_role_policy_attachment.monitoring]

  lifecycle {
    precondition {
      condition     = var.settings.iops >= 1000 && contains(["io1", "io2"], var.settings.storage_type)
      error_message = "A Multi-AZ DB cluster needs provisioned storage: set postgres.storage_type to io2 (or io1) and postgres.iops to at least 1000."
    }
  }
}

# The cluster's own endpoints are one for the writer and one that spreads over the standbys. A reader that must know
# which server answers, because each proves its own freshness, needs the members' addresses.
data "aws_db_instance" "member" {
  count = local.is_cluster ? 3 : 0

  db_instance_identifier = try(local.members[count.index], local.members[0])
}
