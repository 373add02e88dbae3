# What the cluster's controllers may do. They are installed by the operator (docs/aws-terraform.md lists
# them); the roles wait for them.

locals {
  owned_by_cluster = { StringEquals = { "aws:ResourceTag/elbv2.k8s.aws/cluster" = var.cluster_name } }
  asked_by_cluster = { StringEquals = { "aws:RequestTag/elbv2.k8s.aws/cluster" = var.cluster_name } }

  controllers = {
    # AWS Load Balancer Controller, cut down to Network Load Balancers: devices bring client certificates,
    # so TLS passes through, and nothing here needs HTTP load balancers, WAF, Shield or Cognito.
    "load-balancer" = {
      namespace       = "kube-system"
      service_account = "aws-load-balancer-controller"
      statements = [
        {
          Sid    = "Look"
          Effect = "Allow"
          Action = [
            "ec2:DescribeAccountAttributes", "ec2:DescribeAddresses", "ec2:DescribeAvailabilityZones",
            "ec2:DescribeInstances", "ec2:DescribeInternetGateways", "ec2:DescribeNetworkInterfaces",
            "ec2:DescribeRouteTables", "ec2:DescribeSecurityGroups", "ec2:DescribeSubnets",
            "ec2:DescribeTags", "ec2:DescribeVpcPeeringConnections", "ec2:DescribeVpcs",
            "ec2:GetSecurityGroupsForVpc", "elasticloadbalancing:DescribeCapacityReservation",
            "elasticloadbalancing:DescribeListenerAttributes", "elasticloadbalancing:DescribeListenerCertificates",
            "elasticloadbalancing:DescribeListeners", "elasticloadbalancing:DescribeLoadBalancerAttributes",
            "elasticloadbalancing:DescribeLoadBalancers", "elasticloadbalancing:DescribeRules",
            "elasticloadbalancing:DescribeSSLPolicies", "elasticloadbalancing:DescribeTags",
            "elasticloadbalancing:DescribeTargetGroupAttributes", "elasticloadbalancing:DescribeTargetGroups",
            "elasticloadbalancing:DescribeTargetHealth", "elasticloadbalancing:DescribeTrustStores",
          ]
          # Describe actions take no resource.
          Resource = "*"
        },
        {
          Sid       = "FirstLoadBalancerOfTheAccount"
          Effect    = "Allow"
          Action    = ["iam:CreateServiceLinkedRole"]
          Resource  = "*"
          Condition = { StringEquals = { "iam:AWSServiceName" = "elasticloadbalancing.amazonaws.com" } }
        },
        {
          # Rules between the load balancer and the pods go into the cluster's own group, which carries no
          # tag of the controller.
          Sid      = "OpenPodPorts"
          Effect   = "Allow"
          Action   = ["ec2:AuthorizeSecurityGroupIngress", "ec2:RevokeSecurityGroupIngress"]
          Resource = "arn:${data.aws_partition.current.partition}:ec2:${data.aws_region.current.name}:${data.aws_caller_identity.current.account_id}:security-group/*"
        },
        {
          Sid      = "MakeSecurityGroups"
          Effect   = "Allow"
          Action   = ["ec2:CreateSecurityGroup"]
          Resource = "*"
        },
        {
          Sid      = "TagNewSecurityGroups"
          Effect   = "Allow"
          Action   = ["ec2:CreateTags"]
          Resource = "arn:${data.aws_partition.current.partition}:ec2:*:*:security-group/*"
          Condition = {
            StringEquals = {
              "ec2:CreateAction"                     = "CreateSecurityGroup"
              "aws:RequestTag/elbv2.k8s.aws/cluster" = var.cluster_name
            }
          }
        },
        {
          Sid       = "OwnSecurityGroups"
          Effect    = "Allow"
          Action    = ["ec2:CreateTags", "ec2:DeleteTags", "ec2:DeleteSecurityGroup"]
          Resource  = "arn:${data.aws_partition.current.partition}:ec2:*:*:security-group/*"
          Condition = local.owned_by_cluster
        },
        {
          Sid       = "MakeLoadBalancers"
          Effect    = "Allow"
          Action    = ["elasticloadbalancing:CreateLoadBalancer", "elasticloadbalancing:CreateTargetGroup"]
          Resource  = "*"
          Condition = local.asked_by_cluster
        },
        {
          Sid    = "TagNewLoadBalancers"
          Effect = "Allow"
          Action = ["elasticloadbalancing:AddTags"]
          Resource = [
            "arn:${data.aws_partition.current.partition}:elasticloadbalancing:*:*:loadbalancer/net/*/*",
            "arn:${data.aws_partition.current.partition}:elasticloadbalancing:*:*:targetgroup/*/*",
          ]
          Condition = {
            StringEquals = {
              "elasticloadbalancing:CreateAction"    = ["CreateLoadBalancer", "CreateTargetGroup"]
              "aws:RequestTag/elbv2.k8s.aws/cluster" = var.cluster_name
            }
          }
        },
        {
          # Listeners of a network load balancer carry the load balancer's name in their own.
          Sid    = "Listeners"
          Effect = "Allow"
          Action = [
            "elasticloadbalancing:AddTags", "elasticloadbalancing:CreateListener",
            "elasticloadbalancing:DeleteListener", "elasticloadbalancing:ModifyListener",
            "elasticloadbalancing:ModifyListenerAttributes", "elasticloadbalancing:RemoveTags",
          ]
          Resource = [
            "arn:${data.aws_partition.current.partition}:elasticloadbalancing:*:*:listener/net/*/*/*",
            "arn:${data.aws_partition.current.partition}:elasticloadbalancing:*:*:loadbalancer/net/*/*",
          ]
        },
        {
          Sid    = "OwnLoadBalancers"
          Effect = "Allow"
          Action = [
            "elasticloadbalancing:AddTags", "elasticloadbalancing:DeleteLoadBalancer",
            "elasticloadbalancing:DeleteTargetGroup", "elasticloadbalancing:DeregisterTargets",
            "elasticloadbalancing:ModifyLoadBalancerAttributes", "elasticloadbalancing:ModifyTargetGroup",
            "elasticloadbalancing:ModifyTargetGroupAttributes", "elasticloadbalancing:RegisterTargets",
            "elasticloadbalancing:RemoveTags", "elasticloadbalancing:SetIpAddressType",
            "elasticloadbalancing:SetSecurityGroups", "elasticloadbalancing:SetSubnets",
          ]
          Resource  = "*"
          Condition = local.owned_by_cluster
        },
      ]
    }

    # External Secrets Operator: copies the platform's secrets into the cluster, and no others.
    "external-secrets" = {
      namespace       = "external-secrets"
      service_account = "external-secrets"
      statements = [
        {
          Sid      = "ReadPlatformSecrets"
          Effect   = "Allow"
          Action   = ["secretsmanager:GetSecretValue", "secretsmanager:DescribeSecret"]
          Resource = [for secret in values(var.secrets) : secret.arn]
        },
        {
          Sid       = "DecryptPlatformSecrets"
          Effect    = "Allow"
          Action    = ["kms:Decrypt"]
          Resource  = distinct([for secret in values(var.secrets) : secret.kms_key_arn])
          Condition = { StringLike = { "kms:ViaService" = "secretsmanager.*.amazonaws.com" } }
        },
      ]
    }

    # Cluster Autoscaler: changes the size of this cluster's node groups.
    "autoscaler" = {
      namespace       = "kube-system"
      service_account = "cluster-autoscaler"
      statements = [
        {
          Sid    = "Look"
          Effect = "Allow"
          Action = [
            "autoscaling:DescribeAutoScalingGroups", "autoscaling:DescribeAutoScalingInstances",
            "autoscaling:DescribeLaunchConfigurations", "autoscaling:DescribeScalingActivities",
            "autoscaling:DescribeTags", "ec2:DescribeImages", "ec2:DescribeInstanceTypes",
            "ec2:DescribeLaunchTemplateVersions", "ec2:GetInstanceTypesFromInstanceRequirements",
          ]
          Resource = "*"
        },
        {
          Sid      = "DescribeOwnNodeGroups"
          Effect   = "Allow"
          Action   = ["eks:DescribeNodegroup"]
          Resource = "${replace(var.cluster_arn, ":cluster/", ":nodegroup/")}/*"
        },
        {
          Sid       = "ResizeOwnGroups"
          Effect    = "Allow"
          Action    = ["autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"]
          Resource  = "*"
          Condition = { StringEquals = { "aws:ResourceTag/k8s.io/cluster-autoscaler/${var.cluster_name}" = "owned" } }
        },
      ]
    }
  }

  controller_policies = {
    for controller, spec in local.controllers : controller => jsonencode({
      Version   = "2012-10-17"
      Statement = spec.statements
    })
  }
}
