output "alerts_topic_arn" {
  description = "Topic of alarms, database events and budget warnings."
  value       = aws_sns_topic.alerts.arn
}

output "alarms" {
  description = "Every alarm by its short name."
  value       = local.alarms
}
