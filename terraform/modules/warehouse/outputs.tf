output "host" {
  description = "Host of the warehouse."
  value       = local.is_cluster ? aws_redshift_cluster.this[0].dns_name : aws_redshiftserverless_workgroup.this[0].endpoint[0].address
}

output "port" {
  description = "Port of the warehouse."
  value       = 5439
}

output "database_name" {
  description = "Database of the warehouse."
  value       = var.settings.database_name
}

output "admin_username" {
  description = "Administrator of the warehouse."
  value       = var.settings.admin_username
}

output "admin_secret_arn" {
  description = "Secret of the administrator, made and rotated by Redshift: JSON with `username` and `password`."
  value       = local.is_cluster ? aws_redshift_cluster.this[0].master_password_secret_arn : aws_redshiftserverless_namespace.this[0].admin_password_secret_arn
}

output "copy_role_arn" {
  description = "Role that COPY names in its IAM_ROLE clause."
  value       = aws_iam_role.copy.arn
}

output "kms_key_arn" {
  description = "Key of storage and the administrator's secret."
  value       = module.key.arn
}

output "identifier" {
  description = "Cluster identifier or workgroup name, as in metrics."
  value       = var.name
}

output "kind" {
  description = "`cluster` or `serverless`."
  value       = var.settings.kind
}

output "security_group_id" {
  description = "Security group of the warehouse."
  value       = aws_security_group.this.id
}

output "wlm" {
  description = "Queues of the provisioned cluster."
  value       = local.wlm
}
