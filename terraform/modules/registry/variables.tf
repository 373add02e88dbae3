variable "name" {
  description = "Name of the repository."
  type        = string
}

variable "kept_images" {
  description = "Tagged images kept; older ones expire."
  type        = number
}

variable "deletion_protection" {
  description = "Refuses to delete the repository while it holds images."
  type        = bool
}
