# A root for applying modules to a local imitation of AWS: the ones it imitates well enough. The address
# comes from AWS_ENDPOINT_URL; the credentials open nothing anywhere.
#
# Kafka, the warehouse and the cluster are not here: the imitation does not have MSK, Redshift Serverless,
# EKS add-ons, Pod Identity or the subscribers of budgets. The mocked plans cover those.

terraform {
  required_version = ">= 1.11"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
}

provider "aws" {
  region                      = "eu-west-1"
  access_key                  = "imitation"
  secret_key                  = "imitation"
  s3_use_path_style           = true
  skip_credentials_validation = true
  skip_metadata_api_check     = true

  default_tags {
    tags = { Project = "atlasco", Environment = "imitation" }
  }
}

variable "password_version" {
  description = "As in the platform: raising it makes new passwords."
  type        = number
  default     = 1
}

locals {
  name = "atlasco-imitation"

  postgres = {
    topology                     = "instance"
    engine_version               = "17"
    instance_class               = "db.t4g.medium"
    storage_type                 = "gp3"
    allocated_storage_gib        = 50
    max_allocated_storage_gib    = 200
    iops                         = 0
    database_name                = "atlasco"
    owner_username               = "atlasco_owner"
    max_connections              = 200
    max_wal_size_mib             = 4096
    backup_retention_days        = 3
    performance_insights_days    = 7
    monitoring_interval_seconds  = 60
    apply_immediately            = true
    preferred_backup_window      = "02:00-03:00"
    preferred_maintenance_window = "sun:03:30-sun:04:30"
  }
}

module "logs_key" {
  source = "../../modules/key"

  name          = "${local.name}-logs"
  description   = "Log groups."
  encrypts_logs = true
}

module "network" {
  source = "../../modules/network"

  name                = local.name
  cidr                = "10.20.0.0/16"
  availability_zones  = ["eu-west-1a", "eu-west-1b", "eu-west-1c"]
  nat_gateways        = "single"
  interface_endpoints = ["ecr.api", "ecr.dkr", "secretsmanager", "logs", "sts"]
  log_retention_days  = 30
  logs_kms_key_arn    = module.logs_key.arn
}

resource "aws_security_group" "cluster" {
  name        = "${local.name}-cluster"
  description = "Stands for the cluster's own group."
  vpc_id      = module.network.vpc_id
}

module "staging" {
  source = "../../modules/staging"

  name                = local.name
  settings            = { parquet_retention_days = 400, manifest_retention_days = 30, noncurrent_days = 7 }
  deletion_protection = false
}

module "postgres" {
  source = "../../modules/postgres"

  name                      = local.name
  vpc_id                    = module.network.vpc_id
  subnet_ids                = module.network.data_subnet_ids
  client_security_group_ids = { cluster = aws_security_group.cluster.id }
  settings                  = local.postgres
  deletion_protection       = false
  log_retention_days        = 30
  logs_kms_key_arn          = module.logs_key.arn
}

module "registry" {
  source = "../../modules/registry"

  name                = "${local.name}/telemetry"
  kept_images         = 30
  deletion_protection = false
}

module "secrets" {
  source = "../../modules/secrets"

  name                = local.name
  usernames           = { "postgres/ingest" = "atlasco_ingest", "postgres/query" = "atlasco_query" }
  password_version    = var.password_version
  deletion_protection = false
}

output "vpc_id" {
  description = "VPC."
  value       = module.network.vpc_id
}

output "data_subnet_ids" {
  description = "Subnets without a route out."
  value       = module.network.data_subnet_ids
}

output "bucket" {
  description = "Staging bucket."
  value       = module.staging.bucket
}

output "database" {
  description = "Identifier of the database."
  value       = module.postgres.identifier
}

output "cluster_security_group_id" {
  description = "Group that stands for the cluster's own."
  value       = aws_security_group.cluster.id
}

output "secret_names" {
  description = "Secrets by path."
  value       = module.secrets.names
}
