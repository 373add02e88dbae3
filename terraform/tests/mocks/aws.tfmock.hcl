# Values a plan needs to have the shape of AWS's own: ARNs where the provider checks them, an
# account. Everything else is invented by Terraform.

mock_data "aws_caller_identity" {
  defaults = { account_id = "123456789012" }
}

mock_data "aws_partition" {
  defaults = { partition = "aws" }
}

mock_data "aws_region" {
  defaults = { name = "eu-west-1" }
}

mock_resource "aws_kms_key" {
  defaults = { arn = "arn:aws:kms:eu-west-1:123456789012:key/11111111-2222-3333-4444-555555555555" }
}

mock_resource "aws_iam_role" {
  defaults = { arn = "arn:aws:iam::123456789012:role/mock" }
}

mock_resource "aws_cloudwatch_log_group" {
  defaults = { arn = "arn:aws:logs:eu-west-1:123456789012:log-group:mock" }
}

mock_resource "aws_secretsmanager_secret" {
  defaults = { arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:mock" }
}

mock_resource "aws_sns_topic" {
  defaults = { arn = "arn:aws:sns:eu-west-1:123456789012:mock" }
}

mock_resource "aws_s3_bucket" {
  defaults = { arn = "arn:aws:s3:::mock" }
}

mock_resource "aws_msk_configuration" {
  defaults = { arn = "arn:aws:kafka:eu-west-1:123456789012:configuration/mock/1", latest_revision = 1 }
}

mock_resource "aws_msk_cluster" {
  defaults = {
    arn                        = "arn:aws:kafka:eu-west-1:123456789012:cluster/mock/abcd-1"
    bootstrap_brokers_sasl_iam = "b-1.mock:9098,b-2.mock:9098"
  }
}

mock_resource "aws_eks_cluster" {
  defaults = {
    arn        = "arn:aws:eks:eu-west-1:123456789012:cluster/mock"
    endpoint   = "https://mock.eks"
    vpc_config = { cluster_security_group_id = "sg-cluster" }
  }
}

mock_resource "aws_db_instance" {
  defaults = {
    address            = "mock.rds"
    master_user_secret = [{ secret_arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:rds-owner" }]
  }
}

mock_resource "aws_rds_cluster" {
  defaults = {
    endpoint           = "mock.cluster.rds"
    reader_endpoint    = "mock.cluster-ro.rds"
    cluster_members    = ["mock-instance-1", "mock-instance-2", "mock-instance-3"]
    master_user_secret = [{ secret_arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:rds-owner" }]
  }
}

mock_resource "aws_redshift_cluster" {
  defaults = {
    dns_name                   = "mock.redshift"
    master_password_secret_arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:redshift-admin"
  }
}

mock_resource "aws_redshiftserverless_namespace" {
  defaults = { admin_password_secret_arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:serverless-admin" }
}

mock_resource "aws_redshiftserverless_workgroup" {
  defaults = {
    arn      = "arn:aws:redshift-serverless:eu-west-1:123456789012:workgroup/mock"
    endpoint = [{ address = "mock.redshift-serverless", port = 5439, vpc_endpoint = [] }]
  }
}
