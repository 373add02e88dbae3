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
  description = "Secrets that workloads read, by purpose, each with the key that encrypts it. The warehouse administrator's is not among them: people use it, once."
  type = object({
    postgres_owner   = object({ arn = string, kms_key_arn = string })
    postgres_ingest  = object({ arn = string, kms_key_arn = string })
    postgres_query   = object({ arn = string, kms_key_arn = string })
    postgres_relay   = object({ arn = string, kms_key_arn = string })
    postgres_loader  = object({ arn = string, kms_key_arn = string })
    postgres_rollup  = object({ arn = string, kms_key_arn = string })
    warehouse_loader = object({ arn = string, kms_key_arn = string })
    warehouse_reader = object({ arn = string, kms_key_arn = string })
  })
}

variable "kafka" {
  description = "Cluster, topics and consumer groups of the change stream: the loader's, and those of the tools in its image."
  type = object({
    cluster_arn       = string
    changes_topic     = string
    dead_letter_topic = string
    consumer_group    = string
    tool_groups       = list(string)
  })
}

variable "staging" {
  description = "Bucket between loader and warehouse, and its key."
  type        = object({ bucket_arn = string, kms_key_arn = string })
}
