variable "name" {
  description = "Prefix of every role name."
  type        = string
}

variable "cluster_name" {
  description = "Cluster whose service accounts get the roles."
  type        = string
}

variable "cluster_arn" {
  description = "ARN of that cluster; no other cluster can use the roles."
  type        = string
}

variable "namespace" {
  description = "Namespace of the platform's workloads."
  type        = string
}

variable "secrets" {
  description = "Secrets by purpose, each with the key that encrypts it."
  type = object({
    postgres_owner   = object({ arn = string, kms_key_arn = string })
    postgres_ingest  = object({ arn = string, kms_key_arn = string })
    postgres_query   = object({ arn = string, kms_key_arn = string })
    warehouse_admin  = object({ arn = string, kms_key_arn = string })
    warehouse_loader = object({ arn = string, kms_key_arn = string })
    warehouse_reader = object({ arn = string, kms_key_arn = string })
  })
}

variable "kafka" {
  description = "Cluster, topics and consumer group of the change stream."
  type = object({
    cluster_arn       = string
    changes_topic     = string
    dead_letter_topic = string
    consumer_group    = string
  })
}

variable "staging" {
  description = "Bucket between loader and warehouse, and its key."
  type        = object({ bucket_arn = string, kms_key_arn = string })
}
