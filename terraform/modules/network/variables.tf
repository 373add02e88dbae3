variable "name" {
  description = "Prefix of every resource name."
  type        = string
}

variable "cidr" {
  description = "Address range of the VPC, /16 to /18."
  type        = string
}

variable "availability_zones" {
  description = "Three zones, in an order that never changes: it decides the address ranges."
  type        = list(string)
}

variable "nat_gateways" {
  description = "`single`: one NAT gateway for the environment; `per_az`: one in each availability zone."
  type        = string
}

variable "interface_endpoints" {
  description = "Services reached over interface endpoints, by the last part of their name (`ecr.api`)."
  type        = set(string)
}

variable "log_retention_days" {
  description = "Days flow logs are kept."
  type        = number
}

variable "logs_kms_key_arn" {
  description = "KMS key that encrypts the flow logs."
  type        = string
}
