# Redshift, either a provisioned cluster (steady load, RA3 so that storage and nodes are bought apart) or
# serverless (paid by the second, for environments that sleep). Both speak the same SQL on the same port,
# live in the subnets without a route out, and read the staging bucket through the VPC.

data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}

locals {
  is_cluster = var.settings.kind == "cluster"

  log_types  = toset(["connectionlog", "userlog", "useractivitylog"])
  log_prefix = local.is_cluster ? "/aws/redshift/cluster/${var.name}" : "/aws/redshift/${var.name}"
}

module "key" {
  source = "../key"

  name        = "${var.name}-warehouse"
  description = "Redshift ${var.name}: storage, snapshots and the administrator's password."
}

resource "aws_security_group" "this" {
  name        = "${var.name}-warehouse"
  description = "Redshift: connections from the platform's workloads; outwards to S3 and the VPC endpoints."
  vpc_id      = var.vpc_id

  tags = { Name = "${var.name}-warehouse" }
}

resource "aws_vpc_security_group_ingress_rule" "clients" {
  for_each = var.client_security_group_ids

  security_group_id            = aws_security_group.this.id
  description                  = "Redshift from ${each.key}."
  referenced_security_group_id = each.value
  ip_protocol                  = "tcp"
  from_port                    = 5439
  to_port                      = 5439
}

# With enhanced VPC routing COPY leaves through this group, so it must be let out to S3, and only there.
resource "aws_vpc_security_group_egress_rule" "s3" {
  security_group_id = aws_security_group.this.id
  description       = "COPY from S3."
  prefix_list_id    = var.s3_prefix_list_id
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}

resource "aws_vpc_security_group_egress_rule" "endpoints" {
  security_group_id            = aws_security_group.this.id
  description                  = "AWS APIs through the VPC endpoints."
  referenced_security_group_id = var.endpoints_security_group_id
  ip_protocol                  = "tcp"
  from_port                    = 443
  to_port                      = 443
}

resource "aws_cloudwatch_log_group" "audit" {
  for_each = local.log_types

  name              = "${local.log_prefix}/${each.key}"
  retention_in_days = var.log_retention_days
  kms_key_id        = var.logs_kms_key_arn
}

# What COPY runs as: it reads the staging bucket and nothing else.
resource "aws_iam_role" "copy" {
  name = "${var.name}-warehouse-copy"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = ["redshift.amazonaws.com", "redshift-serverless.amazonaws.com"] }
      Action    = "sts:AssumeRole"
      Condition = { StringEquals = { "aws:SourceAccount" = data.aws_caller_identity.current.account_id } }
    }]
  })
}

resource "aws_iam_role_policy" "copy" {
  name = "read-staging"
  role = aws_iam_role.copy.id

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Sid = "List", Effect = "Allow", Action = ["s3:ListBucket", "s3:GetBucketLocation"], Resource = var.staging_bucket_arn },
      { Sid = "Read", Effect = "Allow", Action = ["s3:GetObject"], Resource = "${var.staging_bucket_arn}/*" },
      { Sid = "Decrypt", Effect = "Allow", Action = ["kms:Decrypt"], Resource = var.staging_kms_key_arn },
    ]
  })
}

# --- Provisioned cluster ------------------------------------------------------------------------

resource "aws_redshift_subnet_group" "this" {
  count = local.is_cluster ? 1 : 0

  name        = var.name
  description = "Subnets without a route out."
  subnet_ids  = var.subnet_ids
}

resource "aws_redshift_parameter_group" "this" {
  count = local.is_cluster ? 1 : 0

  name        = var.name
  family      = "redshift-1.0"
  description = "TLS only, audited, with queues for loading and reading."

  # Refuses connections without TLS.
  parameter {
    name  = "require_ssl"
    value = "true"
  }

  # Who ran which statement; without it the audit log knows only who connected.
  parameter {
    name  = "enable_user_activity_logging"
    value = "true"
  }

  parameter {
    name  = "max_concurrency_scaling_clusters"
    value = tostring(var.settings.concurrency_scaling_max)
  }

  parameter {
    name  = "wlm_json_configuration"
    value = jsonencode(local.wlm)
  }
}

resource "aws_redshift_cluster" "this" {
  #checkov:skip=CKV_AWS_71:Audit logs go to CloudWatch through aws_redshift_logging below; the block this check looks for is deprecated.
  count = local.is_cluster ? 1 : 0

  cluster_identifier = var.name
  database_name      = var.settings.database_name
  node_type          = var.settings.node_type
  cluster_type       = var.settings.node_count > 1 ? "multi-node" : "single-node"
  number_of_nodes    = var.settings.node_count

  master_username                   = var.settings.admin_username
  manage_master_password            = true
  master_password_secret_kms_key_id = module.key.arn

  cluster_subnet_group_name    = aws_redshift_subnet_group.this[0].name
  cluster_parameter_group_name = aws_redshift_parameter_group.this[0].name
  vpc_security_group_ids       = [aws_security_group.this.id]
  port                         = 5439
  publicly_accessible          = false
  enhanced_vpc_routing         = true

  encrypted  = true
  kms_key_id = module.key.arn

  iam_roles            = [aws_iam_role.copy.arn]
  default_iam_role_arn = aws_iam_role.copy.arn

  # RA3 keeps data in managed storage, so a cluster whose zone fails starts again in another.
  availability_zone_relocation_enabled = true
  allow_version_upgrade                = true
  preferred_maintenance_window         = var.settings.maintenance_window
  automated_snapshot_retention_period  = var.settings.snapshot_retention_days
  skip_final_snapshot                  = !var.deletion_protection
  final_snapshot_identifier            = var.deletion_protection ? "${var.name}-final" : null

  lifecycle {
    precondition {
      condition     = startswith(var.settings.node_type, "ra3.")
      error_message = "warehouse.node_type must be an RA3 type (ra3.large, ra3.xlplus, ra3.4xlarge, ra3.16xlarge): zone relocation and growth of storage depend on it."
    }
  }
}

resource "aws_redshift_logging" "this" {
  count = local.is_cluster ? 1 : 0

  cluster_identifier   = aws_redshift_cluster.this[0].id
  log_destination_type = "cloudwatch"
  log_exports          = local.log_types

  depends_on = [aws_cloudwatch_log_group.audit]
}

# An hour of scaling a day is free of charge; beyond the limit queries queue instead of costing.
resource "aws_redshift_usage_limit" "concurrency_scaling" {
  count = local.is_cluster ? 1 : 0

  cluster_identifier = aws_redshift_cluster.this[0].id
  feature_type       = "concurrency-scaling"
  limit_type         = "time"
  period             = "daily"
  amount             = var.settings.concurrency_scaling_minutes
  breach_action      = "disable"
}

# --- Serverless ---------------------------------------------------------------------------------

resource "aws_redshiftserverless_namespace" "this" {
  count = local.is_cluster ? 0 : 1

  namespace_name                   = var.name
  db_name                          = var.settings.database_name
  admin_username                   = var.settings.admin_username
  manage_admin_password            = true
  admin_password_secret_kms_key_id = module.key.arn
  kms_key_id                       = module.key.arn
  iam_roles                        = [aws_iam_role.copy.arn]
  default_iam_role_arn             = aws_iam_role.copy.arn
  log_exports                      = local.log_types

  depends_on = [aws_cloudwatch_log_group.audit]
}

resource "aws_redshiftserverless_workgroup" "this" {
  count = local.is_cluster ? 0 : 1

  namespace_name       = aws_redshiftserverless_namespace.this[0].namespace_name
  workgroup_name       = var.name
  base_capacity        = var.settings.base_capacity_rpu
  max_capacity         = var.settings.max_capacity_rpu
  subnet_ids           = var.subnet_ids
  security_group_ids   = [aws_security_group.this.id]
  port                 = 5439
  publicly_accessible  = false
  enhanced_vpc_routing = true

  config_parameter {
    parameter_key   = "require_ssl"
    parameter_value = "true"
  }

  config_parameter {
    parameter_key   = "enable_user_activity_logging"
    parameter_value = "true"
  }

  # In seconds; the same bound the cluster's read queue sets.
  config_parameter {
    parameter_key   = "max_query_execution_time"
    parameter_value = "900"
  }
}

resource "aws_redshiftserverless_usage_limit" "compute" {
  count = local.is_cluster ? 0 : 1

  resource_arn  = aws_redshiftserverless_workgroup.this[0].arn
  usage_type    = "serverless-compute"
  period        = "daily"
  amount        = var.settings.daily_rpu_hours
  breach_action = "deactivate"
}
