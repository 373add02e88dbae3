# Passwords of the database users that no AWS service manages. Terraform makes each value while applying
# and hands it over in a write-only argument: it is in neither the plan nor the state.
#
# uuid() draws on the operating system's generator and yields 122 random bits; two of them, without their
# dashes, make a 64-digit hexadecimal password that needs no quoting in a connection string. The function
# runs again on every apply, but the provider sends the value only when `password_version` changes.

module "key" {
  source = "../key"

  name        = "${var.name}-secrets"
  description = "Passwords of ${var.name}'s database users."
}

resource "aws_secretsmanager_secret" "this" {
  #checkov:skip=CKV2_AWS_57:A rotation needs the password set in the database as well. Raising password_version, then the migration job for PostgreSQL and ALTER USER for the warehouse, rotates; a timer in between would lock workloads out.
  for_each = var.usernames

  name                    = "${var.name}/${each.key}"
  description             = "Database user ${each.value}: JSON with username and password."
  kms_key_id              = module.key.arn
  recovery_window_in_days = var.deletion_protection ? 30 : 0
}

resource "aws_secretsmanager_secret_version" "this" {
  for_each = var.usernames

  secret_id = aws_secretsmanager_secret.this[each.key].id

  secret_string_wo = jsonencode({
    username = each.value
    password = replace("${uuid()}${uuid()}", "-", "")
  })
  secret_string_wo_version = var.password_version
}
