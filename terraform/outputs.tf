# What Kubernetes manifests, guides and operators need. Nothing here is secret: secrets appear as names and
# ARNs only.

# --- Place --------------------------------------------------------------------------------------

output "region" {
  description = "Region of the environment."
  value       = var.region
}

output "vpc_id" {
  description = "VPC; the load balancer controller is told, because pods cannot ask the node."
  value       = module.network.vpc_id
}

output "public_subnet_ids" {
  description = "Subnets of the load balancer that devices connect to."
  value       = module.network.public_subnet_ids
}

# --- Cluster and image --------------------------------------------------------------------------

output "cluster_name" {
  description = "Name for `aws eks update-kubeconfig --name`."
  value       = module.cluster.name
}

output "cluster_endpoint" {
  description = "Address of the Kubernetes API."
  value       = module.cluster.endpoint
}

output "namespace" {
  description = "Namespace that the Pod Identity associations expect."
  value       = var.namespace
}

output "repository_url" {
  description = "Image repository, without a tag."
  value       = module.registry.repository_url
}

output "role_arns" {
  description = "IAM role of each workload (gateway, relay, loader, rollup, migrate, maintain) and controller (load-balancer, external-secrets, autoscaler)."
  value       = module.identities.role_arns
}

output "service_accounts" {
  description = "Namespace and service account name that each role is bound to."
  value       = module.identities.service_accounts
}

# --- PostgreSQL ---------------------------------------------------------------------------------

output "postgres_host" {
  description = "Host of the primary."
  value       = module.postgres.writer_host
}

output "postgres_replica_host" {
  description = "Host that spreads over the readable standbys; null where there are none."
  value       = module.postgres.reader_host
}

output "postgres_member_hosts" {
  description = "Hosts of the cluster's members, one of which writes: what the gateways' replicas are made of. Empty where there is a single instance."
  value       = module.postgres.member_hosts
}

output "postgres_port" {
  description = "Port of PostgreSQL."
  value       = module.postgres.port
}

output "postgres_database" {
  description = "Database name."
  value       = module.postgres.database_name
}

output "postgres_owner_username" {
  description = "Role that owns the schema; its password is in the owner secret."
  value       = module.postgres.owner_username
}

output "postgres_max_connections" {
  description = "Upper bound of all pools together."
  value       = var.postgres.max_connections
}

# --- Kafka --------------------------------------------------------------------------------------

output "kafka_bootstrap_servers" {
  description = "Brokers for SASL_SSL with IAM (port 9098), comma separated."
  value       = module.kafka.bootstrap_brokers
}

output "kafka_topics" {
  description = "Names the program and the IAM policies agree on."
  value = {
    changes        = local.changes_topic
    dead_letter    = local.dead_letter_topic
    consumer_group = local.consumer_group
  }
}

output "kafka_partitions" {
  description = "Partitions the relay gives the changes topic when it makes it."
  value       = module.kafka.partitions
}

output "kafka_replication_factor" {
  description = "Replication factor the relay gives the changes topic when it makes it."
  value       = module.kafka.replication_factor
}

# --- Warehouse ----------------------------------------------------------------------------------

output "warehouse_host" {
  description = "Host of Redshift."
  value       = module.warehouse.host
}

output "warehouse_port" {
  description = "Port of Redshift."
  value       = module.warehouse.port
}

output "warehouse_database" {
  description = "Database name."
  value       = module.warehouse.database_name
}

output "warehouse_copy_role_arn" {
  description = "Role for COPY's IAM_ROLE clause."
  value       = module.warehouse.copy_role_arn
}

output "staging_bucket" {
  description = "Bucket for Parquet (`parquet/`) and manifests (`manifests/`)."
  value       = module.staging.bucket
}

output "staging_kms_key_arn" {
  description = "Key of the staging bucket; uploads may omit it."
  value       = module.staging.kms_key_arn
}

# --- Secrets ------------------------------------------------------------------------------------

output "secret_names" {
  description = "Secrets with `username` and `password`, by purpose. The owner's and the administrator's names are chosen by AWS; use their ARNs."
  value = {
    postgres_ingest  = module.secrets.names["postgres/ingest"]
    postgres_query   = module.secrets.names["postgres/query"]
    postgres_relay   = module.secrets.names["postgres/relay"]
    postgres_loader  = module.secrets.names["postgres/loader"]
    postgres_rollup  = module.secrets.names["postgres/rollup"]
    warehouse_loader = module.secrets.names["warehouse/loader"]
    warehouse_reader = module.secrets.names["warehouse/reader"]
  }
}

output "secret_arns" {
  description = "ARNs of all secrets, by purpose."
  value = {
    postgres_owner   = module.postgres.owner_secret_arn
    postgres_ingest  = module.secrets.arns["postgres/ingest"]
    postgres_query   = module.secrets.arns["postgres/query"]
    postgres_relay   = module.secrets.arns["postgres/relay"]
    postgres_loader  = module.secrets.arns["postgres/loader"]
    postgres_rollup  = module.secrets.arns["postgres/rollup"]
    warehouse_admin  = module.warehouse.admin_secret_arn
    warehouse_loader = module.secrets.arns["warehouse/loader"]
    warehouse_reader = module.secrets.arns["warehouse/reader"]
  }
}

# --- Observation --------------------------------------------------------------------------------

output "alerts_topic_arn" {
  description = "Topic of alarms, database events and budget warnings."
  value       = module.observability.alerts_topic_arn
}

# --- Review -------------------------------------------------------------------------------------

output "settings" {
  description = "Effective sizes and policies, with every default filled in: what a review or a sizing compares."
  value = {
    postgres  = var.postgres
    kafka     = var.kafka
    warehouse = var.warehouse
    staging   = var.staging
    cluster   = var.cluster
  }
}
