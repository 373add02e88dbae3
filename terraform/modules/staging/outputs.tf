output "bucket" {
  description = "Name of the staging bucket."
  value       = aws_s3_bucket.this.bucket
}

output "bucket_arn" {
  description = "ARN of the staging bucket."
  value       = aws_s3_bucket.this.arn
}

output "kms_key_arn" {
  description = "Key of the staging bucket."
  value       = module.key.arn
}

output "access_log_bucket" {
  description = "Bucket of the access logs."
  value       = aws_s3_bucket.access_logs.bucket
}
