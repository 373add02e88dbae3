output "arns" {
  description = "ARN of each secret, by its path."
  value       = { for path, secret in aws_secretsmanager_secret.this : path => secret.arn }
}

output "names" {
  description = "Name of each secret, by its path."
  value       = { for path, secret in aws_secretsmanager_secret.this : path => secret.name }
}

output "kms_key_arn" {
  description = "Key of the secrets."
  value       = module.key.arn
}
