# One role per service account, bound by Pod Identity. The trust policy repeats the binding: the session
# tags that EKS sets must name this cluster, this namespace and this service account, so that an
# association made elsewhere by mistake yields nothing.

data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}
data "aws_region" "current" {}

locals {
  service_accounts = merge(
    { for workload in keys(local.workload_secrets) : workload => { namespace = var.namespace, service_account = "atlasco-${workload}" } },
    { for controller, spec in local.controllers : controller => { namespace = spec.namespace, service_account = spec.service_account } },
  )
}

resource "aws_iam_role" "this" {
  for_each = local.service_accounts

  name        = "${var.name}-${each.key}"
  description = "Pods of service account ${each.value.namespace}/${each.value.service_account}."

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "PodIdentity"
      Effect    = "Allow"
      Principal = { Service = "pods.eks.amazonaws.com" }
      Action    = ["sts:AssumeRole", "sts:TagSession"]
      Condition = {
        StringEquals = {
          "aws:RequestTag/eks-cluster-arn"            = var.cluster_arn
          "aws:RequestTag/kubernetes-namespace"       = each.value.namespace
          "aws:RequestTag/kubernetes-service-account" = each.value.service_account
        }
      }
    }]
  })
}

resource "aws_iam_role_policy" "this" {
  #checkov:skip=CKV_AWS_355:Only actions that take no resource, or are bound to this cluster by a tag condition, name "*"; all are in controllers.tf, each with its reason.
  #checkov:skip=CKV_AWS_290:As above: writing actions without a resource carry a condition on the cluster's tag.
  for_each = local.service_accounts

  name   = "least-privilege"
  role   = aws_iam_role.this[each.key].id
  policy = merge(local.workload_policies, local.controller_policies)[each.key]
}

resource "aws_eks_pod_identity_association" "this" {
  for_each = local.service_accounts

  cluster_name    = var.cluster_name
  namespace       = each.value.namespace
  service_account = each.value.service_account
  role_arn        = aws_iam_role.this[each.key].arn
}
