# One topic for everything a person should know: alarms, database events, budget warnings.

data "aws_caller_identity" "current" {}

locals {
  publishers = ["cloudwatch.amazonaws.com", "budgets.amazonaws.com", "events.rds.amazonaws.com"]

  event_categories = {
    "db-instance" = ["availability", "failover", "failure", "low storage", "maintenance", "recovery"]
    "db-cluster"  = ["failover", "failure", "maintenance", "notification"]
  }
}

# The publishers above must be let into the key, or alarms vanish without an error anywhere.
module "key" {
  source = "../key"

  name        = "${var.name}-alerts"
  description = "Alert topic of ${var.name}."
  services    = local.publishers
}

resource "aws_sns_topic" "alerts" {
  name              = "${var.name}-alerts"
  kms_master_key_id = module.key.arn
}

resource "aws_sns_topic_policy" "alerts" {
  arn = aws_sns_topic.alerts.arn

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "AwsServicesOfThisAccount"
      Effect    = "Allow"
      Principal = { Service = local.publishers }
      Action    = "sns:Publish"
      Resource  = aws_sns_topic.alerts.arn
      Condition = { StringEquals = { "aws:SourceAccount" = data.aws_caller_identity.current.account_id } }
    }]
  })
}

resource "aws_sns_topic_subscription" "email" {
  for_each = var.alert_emails

  topic_arn = aws_sns_topic.alerts.arn
  protocol  = "email"
  endpoint  = each.key
}

resource "aws_db_event_subscription" "this" {
  name             = "${var.name}-postgres"
  sns_topic        = aws_sns_topic.alerts.arn
  source_type      = var.postgres.source_type
  source_ids       = [var.postgres.identifier]
  event_categories = local.event_categories[var.postgres.source_type]

  depends_on = [aws_sns_topic_policy.alerts]
}

# The whole account: a filter by tag counts nothing until the tag is activated for billing, and a budget
# that silently counts nothing is worse than one that counts too much.
resource "aws_budgets_budget" "this" {
  name         = "${var.name}-monthly"
  budget_type  = "COST"
  time_unit    = "MONTHLY"
  limit_amount = tostring(var.monthly_budget_usd)
  limit_unit   = "USD"

  notification {
    notification_type         = "ACTUAL"
    comparison_operator       = "GREATER_THAN"
    threshold                 = 80
    threshold_type            = "PERCENTAGE"
    subscriber_sns_topic_arns = [aws_sns_topic.alerts.arn]
  }

  notification {
    notification_type         = "FORECASTED"
    comparison_operator       = "GREATER_THAN"
    threshold                 = 100
    threshold_type            = "PERCENTAGE"
    subscriber_sns_topic_arns = [aws_sns_topic.alerts.arn]
  }

  depends_on = [aws_sns_topic_policy.alerts]
}
