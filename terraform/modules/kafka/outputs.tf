output "bootstrap_brokers" {
  description = "Brokers for TLS with IAM, comma separated."
  value       = aws_msk_cluster.this.bootstrap_brokers_sasl_iam
}

output "cluster_arn" {
  description = "ARN of the cluster."
  value       = aws_msk_cluster.this.arn
}

output "cluster_name" {
  description = "Name of the cluster, as in its metrics."
  value       = aws_msk_cluster.this.cluster_name
}

output "broker_count" {
  description = "Number of brokers."
  value       = var.settings.broker_count
}

output "replication_factor" {
  description = "Replication factor of the platform's topics."
  value       = var.settings.replication_factor
}

output "partitions" {
  description = "Partitions of the changes topic."
  value       = var.settings.partitions
}

output "security_group_id" {
  description = "Security group of the brokers."
  value       = aws_security_group.this.id
}
