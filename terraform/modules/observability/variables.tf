variable "name" {
  description = "Prefix of alarm names and name of the topic."
  type        = string
}

variable "alert_emails" {
  description = "Addresses that get every alarm; each confirms its subscription once."
  type        = set(string)
}

variable "monthly_budget_usd" {
  description = "Monthly cost at which the budget warns."
  type        = number
}

variable "postgres" {
  description = "What to watch of PostgreSQL."
  type = object({
    identifier            = string
    source_type           = string
    instance_ids          = list(string)
    has_standbys          = bool
    max_connections       = number
    allocated_storage_gib = number
  })
}

variable "kafka" {
  description = "What to watch of Kafka."
  type = object({
    cluster_name   = string
    broker_count   = number
    changes_topic  = string
    consumer_group = string
  })
}

variable "warehouse" {
  description = "What to watch of the warehouse."
  type        = object({ kind = string, identifier = string })
}

variable "nat_gateway_ids" {
  description = "NAT gateways by zone."
  type        = map(string)
}

variable "container_insights_cluster" {
  description = "Cluster whose Container Insights metrics to watch; null where they are not collected."
  type        = string
  default     = null
}
