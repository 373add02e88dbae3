# The root only names things and passes what one module makes to the next.

locals {
  name = "${var.project}-${var.environment}"

  # Part of the program's contract, not of the deployment: topic and group names are in the code, roles
  # in the schema.
  changes_topic     = "atlasco.changes.v1"
  dead_letter_topic = "atlasco.changes.v1.dead-letter"
  consumer_group    = "atlasco-loader"
  # The loader's image also redrives dead letters, rebuilds and verifies; each reads the log under a group of
  # its own, so that none of them moves the loader.
  tool_groups = ["atlasco-redrive", "atlasco-rebuild", "atlasco-verify"]

  users = {
    "postgres/ingest"  = "atlasco_ingest"
    "postgres/query"   = "atlasco_query"
    "postgres/relay"   = "atlasco_relay"
    "postgres/loader"  = "atlasco_loader"
    "postgres/rollup"  = "atlasco_rollup"
    "warehouse/loader" = "atlasco_loader"
    "warehouse/reader" = "atlasco_reader"
  }

  # All nodes and pods share the cluster's group; which pod may talk to which service is decided by
  # network policies inside the cluster and by credentials.
  clients = { cluster = module.cluster.security_group_id }
}

module "logs_key" {
  source = "./modules/key"

  name          = "${local.name}-logs"
  description   = "CloudWatch log groups of ${local.name}."
  encrypts_logs = true
}

module "network" {
  source = "./modules/network"

  name                = local.name
  cidr                = var.vpc_cidr
  availability_zones  = var.availability_zones
  nat_gateways        = var.nat_gateways
  interface_endpoints = var.interface_endpoints
  log_retention_days  = var.log_retention_days
  logs_kms_key_arn    = module.logs_key.arn
}

module "cluster" {
  source = "./modules/cluster"

  name               = local.name
  subnet_ids         = module.network.private_subnet_ids
  settings           = var.cluster
  log_retention_days = var.log_retention_days
  logs_kms_key_arn   = module.logs_key.arn
}

module "postgres" {
  source = "./modules/postgres"

  name                      = local.name
  vpc_id                    = module.network.vpc_id
  subnet_ids                = module.network.data_subnet_ids
  client_security_group_ids = local.clients
  settings                  = var.postgres
  deletion_protection       = var.deletion_protection
  log_retention_days        = var.log_retention_days
  logs_kms_key_arn          = module.logs_key.arn
}

module "kafka" {
  source = "./modules/kafka"

  name                      = local.name
  vpc_id                    = module.network.vpc_id
  subnet_ids                = module.network.data_subnet_ids
  client_security_group_ids = local.clients
  settings                  = var.kafka
  log_retention_days        = var.log_retention_days
  logs_kms_key_arn          = module.logs_key.arn
}

module "staging" {
  source = "./modules/staging"

  name                = local.name
  settings            = var.staging
  deletion_protection = var.deletion_protection
}

module "warehouse" {
  source = "./modules/warehouse"

  name                        = local.name
  vpc_id                      = module.network.vpc_id
  subnet_ids                  = module.network.data_subnet_ids
  client_security_group_ids   = local.clients
  endpoints_security_group_id = module.network.endpoints_security_group_id
  s3_prefix_list_id           = module.network.s3_prefix_list_id
  staging_bucket_arn          = module.staging.bucket_arn
  staging_kms_key_arn         = module.staging.kms_key_arn
  settings                    = var.warehouse
  deletion_protection         = var.deletion_protection
  log_retention_days          = var.log_retention_days
  logs_kms_key_arn            = module.logs_key.arn
}

module "registry" {
  source = "./modules/registry"

  name                = "${local.name}/telemetry"
  kept_images         = var.kept_images
  deletion_protection = var.deletion_protection
}

module "secrets" {
  source = "./modules/secrets"

  name                = local.name
  usernames           = local.users
  password_version    = var.password_version
  deletion_protection = var.deletion_protection
}

module "identities" {
  source = "./modules/identities"

  name         = local.name
  cluster_name = module.cluster.name
  cluster_arn  = module.cluster.arn
  namespace    = var.namespace

  secrets = {
    postgres_owner   = { arn = module.postgres.owner_secret_arn, kms_key_arn = module.postgres.kms_key_arn }
    postgres_ingest  = { arn = module.secrets.arns["postgres/ingest"], kms_key_arn = module.secrets.kms_key_arn }
    postgres_query   = { arn = module.secrets.arns["postgres/query"], kms_key_arn = module.secrets.kms_key_arn }
    postgres_relay   = { arn = module.secrets.arns["postgres/relay"], kms_key_arn = module.secrets.kms_key_arn }
    postgres_loader  = { arn = module.secrets.arns["postgres/loader"], kms_key_arn = module.secrets.kms_key_arn }
    postgres_rollup  = { arn = module.secrets.arns["postgres/rollup"], kms_key_arn = module.secrets.kms_key_arn }
    warehouse_loader = { arn = module.secrets.arns["warehouse/loader"], kms_key_arn = module.secrets.kms_key_arn }
    warehouse_reader = { arn = module.secrets.arns["warehouse/reader"], kms_key_arn = module.secrets.kms_key_arn }
  }

  kafka = {
    cluster_arn       = module.kafka.cluster_arn
    changes_topic     = local.changes_topic
    dead_letter_topic = local.dead_letter_topic
    consumer_group    = local.consumer_group
    tool_groups       = local.tool_groups
  }

  staging = { bucket_arn = module.staging.bucket_arn, kms_key_arn = module.staging.kms_key_arn }
}

module "observability" {
  source = "./modules/observability"

  name               = local.name
  alert_emails       = var.alert_emails
  monthly_budget_usd = var.monthly_budget_usd
  nat_gateway_ids    = module.network.nat_gateway_ids

  container_insights_cluster = var.cluster.container_insights ? module.cluster.name : null

  postgres = {
    identifier            = module.postgres.identifier
    source_type           = module.postgres.source_type
    instance_ids          = module.postgres.instance_ids
    has_standbys          = var.postgres.topology == "multi_az_cluster"
    max_connections       = var.postgres.max_connections
    allocated_storage_gib = var.postgres.allocated_storage_gib
  }

  kafka = {
    cluster_name   = module.kafka.cluster_name
    broker_count   = module.kafka.broker_count
    changes_topic  = local.changes_topic
    consumer_group = local.consumer_group
  }

  warehouse = { kind = module.warehouse.kind, identifier = module.warehouse.identifier }
}

# A topic without a confirmed reader is an alarm that rings in an empty room.
check "alerts_reach_someone" {
  assert {
    condition     = alltrue([for email in var.alert_emails : !endswith(email, ".example")])
    error_message = "alert_emails still holds a placeholder (an address ending in .example): alarms of this environment reach nobody. Put in a real address."
  }
}
