variable "name" {
  description = "Name of the cluster and prefix of its resources."
  type        = string
}

variable "subnet_ids" {
  description = "Private subnets of nodes and pods."
  type        = list(string)
}

variable "settings" {
  description = "Sizes and policies; the root variable `cluster` explains each."
  type = object({
    version             = string
    public_access_cidrs = list(string)
    admin_arns          = list(string)
    container_insights  = bool
    node_groups = map(object({
      instance_types = list(string)
      ami_type       = string
      capacity_type  = string
      min_size       = number
      desired_size   = number
      max_size       = number
      disk_gib       = number
    }))
  })
}

variable "log_retention_days" {
  description = "Days control plane logs are kept."
  type        = number
}

variable "logs_kms_key_arn" {
  description = "KMS key that encrypts the control plane logs."
  type        = string
}
