# EKS with managed node groups. Access to the API is by access entries only (no aws-auth map); access of
# pods to AWS is by Pod Identity only (no node credentials, no IAM OIDC provider).

data "aws_partition" "current" {}

locals {
  node_policies = toset([
    "AmazonEKSWorkerNodePolicy",
    "AmazonEC2ContainerRegistryPullOnly",
    # The CNI plugin runs on the host network and is what gives pods theirs, so it cannot depend on Pod
    # Identity being up. The hop limit below keeps pods from borrowing these rights.
    "AmazonEKS_CNI_Policy",
  ])

  # Nodes need these to become ready at all.
  addons_before_nodes = {
    # The network policy agent is what makes NetworkPolicy objects more than documentation. Prefix
    # delegation lifts the pods-per-node limit that small instances have.
    "vpc-cni" = {
      enableNetworkPolicy = "true"
      env                 = { ENABLE_PREFIX_DELEGATION = "true", WARM_PREFIX_TARGET = "1" }
    }
    "kube-proxy"             = null
    "eks-pod-identity-agent" = null
  }

  # These run as pods and stay degraded until there is a node.
  addons_after_nodes = {
    "coredns" = null
    # The horizontal autoscaler reads CPU from it.
    "metrics-server" = null
  }
}

module "key" {
  source = "../key"

  name        = "${var.name}-cluster"
  description = "Kubernetes ${var.name}: secrets in etcd."
}

resource "aws_cloudwatch_log_group" "control_plane" {
  name              = "/aws/eks/${var.name}/cluster"
  retention_in_days = var.log_retention_days
  kms_key_id        = var.logs_kms_key_arn
}

resource "aws_iam_role" "cluster" {
  name = "${var.name}-eks-cluster"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "eks.amazonaws.com" }
      Action    = "sts:AssumeRole"
    }]
  })
}

resource "aws_iam_role_policy_attachment" "cluster" {
  role       = aws_iam_role.cluster.name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/AmazonEKSClusterPolicy"
}

resource "aws_eks_cluster" "this" {
  #checkov:skip=CKV_AWS_39:The public endpoint exists only while cluster.public_access_cidrs lists addresses, and is open to those alone; 0.0.0.0/0 is refused by validation.
  name     = var.name
  version  = var.settings.version
  role_arn = aws_iam_role.cluster.arn

  enabled_cluster_log_types = ["api", "audit", "authenticator", "controllerManager", "scheduler"]

  access_config {
    authentication_mode                         = "API"
    bootstrap_cluster_creator_admin_permissions = true
  }

  # The service installs its default add-ons unmanaged otherwise, and the ones below would collide.
  bootstrap_self_managed_addons = false

  encryption_config {
    resources = ["secrets"]

    provider {
      key_arn = module.key.arn
    }
  }

  vpc_config {
    subnet_ids              = var.subnet_ids
    endpoint_private_access = true
    endpoint_public_access  = length(var.settings.public_access_cidrs) > 0
    public_access_cidrs     = length(var.settings.public_access_cidrs) > 0 ? var.settings.public_access_cidrs : null
  }

  # Extended support costs six times the standard price; an overdue version is upgraded instead.
  upgrade_policy {
    support_type = "STANDARD"
  }

  depends_on = [aws_cloudwatch_log_group.control_plane, aws_iam_role_policy_attachment.cluster]
}

resource "aws_eks_access_entry" "admin" {
  for_each = toset(var.settings.admin_arns)

  cluster_name  = aws_eks_cluster.this.name
  principal_arn = each.key
}

resource "aws_eks_access_policy_association" "admin" {
  for_each = toset(var.settings.admin_arns)

  cluster_name  = aws_eks_cluster.this.name
  principal_arn = aws_eks_access_entry.admin[each.key].principal_arn
  policy_arn    = "arn:${data.aws_partition.current.partition}:eks::aws:cluster-access-policy/AmazonEKSClusterAdminPolicy"

  access_scope {
    type = "cluster"
  }
}

# --- Nodes --------------------------------------------------------------------------------------

resource "aws_iam_role" "node" {
  name = "${var.name}-eks-node"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "ec2.amazonaws.com" }
      Action    = "sts:AssumeRole"
    }]
  })
}

resource "aws_iam_role_policy_attachment" "node" {
  for_each = local.node_policies

  role       = aws_iam_role.node.name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/${each.key}"
}

resource "aws_launch_template" "node" {
  for_each = var.settings.node_groups

  name_prefix = "${var.name}-${each.key}-"

  # One hop: a pod cannot reach the node's credentials, only processes on the host network can.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  # The account's EBS key: node disks hold images and logs, no readings, and a key of our own would need
  # a grant to the autoscaling service-linked role, which a new account does not have yet.
  block_device_mappings {
    device_name = "/dev/xvda"

    ebs {
      volume_type           = "gp3"
      volume_size           = each.value.disk_gib
      encrypted             = true
      delete_on_termination = true
    }
  }

  tag_specifications {
    resource_type = "instance"
    tags          = { Name = "${var.name}-${each.key}" }
  }

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_eks_node_group" "this" {
  for_each = var.settings.node_groups

  cluster_name    = aws_eks_cluster.this.name
  node_group_name = each.key
  node_role_arn   = aws_iam_role.node.arn
  subnet_ids      = var.subnet_ids

  ami_type       = each.value.ami_type
  capacity_type  = each.value.capacity_type
  instance_types = each.value.instance_types
  labels         = { "atlasco.io/node-group" = each.key }

  launch_template {
    id      = aws_launch_template.node[each.key].id
    version = aws_launch_template.node[each.key].latest_version
  }

  scaling_config {
    min_size     = each.value.min_size
    desired_size = each.value.desired_size
    max_size     = each.value.max_size
  }

  # A gateway needs its drain time on every node; a third at a time keeps capacity for reconnects.
  update_config {
    max_unavailable_percentage = 33
  }

  # The autoscaler owns the size between the bounds.
  lifecycle {
    ignore_changes = [scaling_config[0].desired_size]
  }

  depends_on = [aws_iam_role_policy_attachment.node, aws_eks_addon.before_nodes]
}

# --- Add-ons ------------------------------------------------------------------------------------

resource "aws_eks_addon" "before_nodes" {
  for_each = local.addons_before_nodes

  cluster_name                = aws_eks_cluster.this.name
  addon_name                  = each.key
  configuration_values        = each.value == null ? null : jsonencode(each.value)
  resolve_conflicts_on_create = "OVERWRITE"
  resolve_conflicts_on_update = "OVERWRITE"
}

resource "aws_eks_addon" "after_nodes" {
  for_each = local.addons_after_nodes

  cluster_name                = aws_eks_cluster.this.name
  addon_name                  = each.key
  resolve_conflicts_on_create = "OVERWRITE"
  resolve_conflicts_on_update = "OVERWRITE"

  depends_on = [aws_eks_node_group.this]
}

# --- Container logs and node metrics in CloudWatch ----------------------------------------------

resource "aws_iam_role" "container_insights" {
  count = var.settings.container_insights ? 1 : 0

  name = "${var.name}-container-insights"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "pods.eks.amazonaws.com" }
      Action    = ["sts:AssumeRole", "sts:TagSession"]
      Condition = {
        StringEquals = {
          "aws:RequestTag/eks-cluster-arn"            = aws_eks_cluster.this.arn
          "aws:RequestTag/kubernetes-namespace"       = "amazon-cloudwatch"
          "aws:RequestTag/kubernetes-service-account" = "cloudwatch-agent"
        }
      }
    }]
  })
}

resource "aws_iam_role_policy_attachment" "container_insights" {
  count = var.settings.container_insights ? 1 : 0

  role       = aws_iam_role.container_insights[0].name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/CloudWatchAgentServerPolicy"
}

resource "aws_eks_addon" "container_insights" {
  count = var.settings.container_insights ? 1 : 0

  cluster_name                = aws_eks_cluster.this.name
  addon_name                  = "amazon-cloudwatch-observability"
  resolve_conflicts_on_create = "OVERWRITE"
  resolve_conflicts_on_update = "OVERWRITE"

  pod_identity_association {
    role_arn        = aws_iam_role.container_insights[0].arn
    service_account = "cloudwatch-agent"
  }

  depends_on = [aws_eks_node_group.this, aws_iam_role_policy_attachment.container_insights]
}
