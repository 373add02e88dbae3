variable "name" {
  description = "Prefix of the bucket name; the account id is appended, because bucket names are global."
  type        = string
}

variable "settings" {
  description = "Retention; the root variable `staging` explains each."
  type = object({
    parquet_retention_days  = number
    manifest_retention_days = number
    noncurrent_days         = number
  })
}

variable "deletion_protection" {
  description = "Refuses to delete the bucket while it holds objects."
  type        = bool
}
