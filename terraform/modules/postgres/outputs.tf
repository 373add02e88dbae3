output "writer_host" {
  description = "Host of the primary."
  value       = local.is_cluster ? aws_rds_cluster.this[0].endpoint : aws_db_instance.this[0].address
}

output "reader_host" {
  description = "Host that spreads connections over the readable standbys; null where there are none."
  value       = local.is_cluster ? aws_rds_cluster.this[0].reader_endpoint : null
}

output "member_hosts" {
  description = "Hosts of a Multi-AZ DB cluster's members, each one server; which of them writes changes with a failover. Empty for a single instance."
  value       = distinct([for member in data.aws_db_instance.member : member.address])
}

output "port" {
  description = "Port of the database."
  value       = 5432
}

output "database_name" {
  description = "Name of the database."
  value       = var.settings.database_name
}

output "owner_username" {
  description = "Role that owns the schema."
  value       = var.settings.owner_username
}

output "owner_secret_arn" {
  description = "Secret of the owner, made and rotated by RDS: JSON with `username` and `password`."
  value       = local.is_cluster ? aws_rds_cluster.this[0].master_user_secret[0].secret_arn : aws_db_instance.this[0].master_user_secret[0].secret_arn
}

output "kms_key_arn" {
  description = "Key of storage, backups and the owner's secret."
  value       = module.key.arn
}

output "security_group_id" {
  description = "Security group of the database."
  value       = aws_security_group.this.id
}

output "instance_ids" {
  description = "Identifiers of the instances, for alarms."
  value       = local.instance_ids
}

output "identifier" {
  description = "Identifier of the instance or the cluster."
  value       = var.name
}

output "source_type" {
  description = "Source type for RDS event subscriptions."
  value       = local.is_cluster ? "db-cluster" : "db-instance"
}

output "parameters" {
  description = "Parameters set away from the RDS defaults."
  value       = { for name, parameter in local.parameters : name => parameter.value }
}
