variable "name" {
  description = "First part of every secret name."
  type        = string
}

variable "usernames" {
  description = "Database users that need a password, by the path of their secret (`postgres/ingest`)."
  type        = map(string)
}

variable "password_version" {
  description = "Raise by one to make new passwords; the migration job then sets those of PostgreSQL, and a person those of the warehouse."
  type        = number
}

variable "deletion_protection" {
  description = "Keeps deleted secrets recoverable for 30 days; without it they are gone at once, and the names free."
  type        = bool
}
