output "role_arns" {
  description = "Role of each workload and controller."
  value       = { for identity, role in aws_iam_role.this : identity => role.arn }
}

output "service_accounts" {
  description = "Namespace and service account of each workload and controller."
  value       = local.service_accounts
}

output "policies" {
  description = "Permission policy of each workload and controller, as JSON."
  value       = merge(local.workload_policies, local.controller_policies)
}
