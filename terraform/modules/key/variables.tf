variable "name" {
  description = "Alias of the key, without the `alias/` prefix."
  type        = string
}

variable "description" {
  description = "What the key protects, as shown in the console."
  type        = string
}

variable "services" {
  description = "AWS service principals that use the key on this account's behalf without a caller of ours, for example cloudwatch.amazonaws.com publishing to an encrypted topic."
  type        = list(string)
  default     = []
}

variable "encrypts_logs" {
  description = "Whether CloudWatch Logs of this account and region encrypts log groups with the key."
  type        = bool
  default     = false
}
