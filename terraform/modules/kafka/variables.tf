variable "name" {
  description = "Name of the cluster and prefix of its resources."
  type        = string
}

variable "vpc_id" {
  description = "VPC of the brokers."
  type        = string
}

variable "subnet_ids" {
  description = "Subnets of the brokers, one per zone; brokers spread evenly over the first two or three."
  type        = list(string)
}

variable "client_security_group_ids" {
  description = "Security groups that may connect, by a name for each."
  type        = map(string)
}

variable "settings" {
  description = "Sizes and policies; the root variable `kafka` explains each."
  type = object({
    version             = string
    broker_count        = number
    instance_type       = string
    storage_gib         = number
    max_storage_gib     = number
    replication_factor  = number
    min_insync_replicas = number
    partitions          = number
    retention_hours     = number
    enhanced_monitoring = string
  })
}

variable "log_retention_days" {
  description = "Days broker logs are kept."
  type        = number
}

variable "logs_kms_key_arn" {
  description = "KMS key that encrypts the broker logs."
  type        = string
}
