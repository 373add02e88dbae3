terraform {
  # Filled by `terraform init -backend-config=backend.hcl`; backend.example.hcl says what goes in.
  backend "s3" {}
}

provider "aws" {
  region = var.region

  # Applying production's values with development's credentials stops here.
  allowed_account_ids = var.account_id == null ? null : [var.account_id]

  default_tags {
    tags = merge(var.tags, {
      Project     = var.project
      Environment = var.environment
      ManagedBy   = "terraform"
    })
  }
}
