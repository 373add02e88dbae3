variable "name" {
  description = "Identifier of the warehouse and prefix of its resources."
  type        = string
}

variable "vpc_id" {
  description = "VPC of the warehouse."
  type        = string
}

variable "subnet_ids" {
  description = "Subnets of the warehouse, one per zone; serverless needs three."
  type        = list(string)
}

variable "client_security_group_ids" {
  description = "Security groups that may connect, by a name for each."
  type        = map(string)
}

variable "endpoints_security_group_id" {
  description = "Security group of the VPC's interface endpoints, which COPY reaches."
  type        = string
}

variable "s3_prefix_list_id" {
  description = "Prefix list of S3, which COPY reads from."
  type        = string
}

variable "staging_bucket_arn" {
  description = "Bucket that COPY reads."
  type        = string
}

variable "staging_kms_key_arn" {
  description = "Key of the staging bucket."
  type        = string
}

variable "settings" {
  description = "Sizes and policies; the root variable `warehouse` explains each."
  type = object({
    kind                        = string
    database_name               = string
    admin_username              = string
    node_type                   = string
    node_count                  = number
    base_capacity_rpu           = number
    max_capacity_rpu            = number
    daily_rpu_hours             = number
    snapshot_retention_days     = number
    concurrency_scaling_max     = number
    concurrency_scaling_minutes = number
    maintenance_window          = string
  })
}

variable "deletion_protection" {
  description = "Keeps a final snapshot on deletion."
  type        = bool
}

variable "log_retention_days" {
  description = "Days audit logs are kept."
  type        = number
}

variable "logs_kms_key_arn" {
  description = "KMS key that encrypts the audit log groups."
  type        = string
}
