variable "name" {
  description = "Identifier of the database and prefix of its resources."
  type        = string
}

variable "vpc_id" {
  description = "VPC of the database."
  type        = string
}

variable "subnet_ids" {
  description = "Subnets of the database, in at least three zones for a Multi-AZ DB cluster."
  type        = list(string)
}

variable "client_security_group_ids" {
  description = "Security groups that may connect, by a name for each."
  type        = map(string)
}

variable "settings" {
  description = "Sizes and policies; the root variable `postgres` explains each."
  type = object({
    topology                     = string
    engine_version               = string
    instance_class               = string
    storage_type                 = string
    allocated_storage_gib        = number
    max_allocated_storage_gib    = number
    iops                         = number
    database_name                = string
    owner_username               = string
    max_connections              = number
    max_wal_size_mib             = number
    backup_retention_days        = number
    performance_insights_days    = number
    monitoring_interval_seconds  = number
    apply_immediately            = bool
    preferred_backup_window      = string
    preferred_maintenance_window = string
  })
}

variable "deletion_protection" {
  description = "Refuses deletion and keeps a final snapshot."
  type        = bool
}

variable "log_retention_days" {
  description = "Days database logs are kept."
  type        = number
}

variable "logs_kms_key_arn" {
  description = "KMS key that encrypts the database's log groups."
  type        = string
}
