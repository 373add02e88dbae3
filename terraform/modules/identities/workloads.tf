# What each workload may do. The rule: what a process needs to do its own part of the flow, named by
# ARN; a right that is missing here fails loudly, one too many is never noticed.
#
#              PostgreSQL         Kafka                                    S3          warehouse
#   gateway    ingest, query      –                                        –           reader
#   relay      relay              make and write changes                   –           –
#   loader     loader             read changes, make and write rejects     read/write  loader
#   rollup     rollup             –                                        –           –
#   migrate    owner, sets users  –                                        –           –
#   maintain   owner              –                                        –           –
#
# Nobody here changes a topic's configuration or deletes one: that is a person's decision, with a person's rights.

locals {
  # MSK names a topic after its cluster: …:cluster/<name>/<uuid> becomes …:topic/<name>/<uuid>/<topic>.
  topic_prefix      = replace(var.kafka.cluster_arn, ":cluster/", ":topic/")
  group_prefix      = replace(var.kafka.cluster_arn, ":cluster/", ":group/")
  changes_topic     = "${local.topic_prefix}/${var.kafka.changes_topic}"
  dead_letter_topic = "${local.topic_prefix}/${var.kafka.dead_letter_topic}"
  loader_groups     = [for group in concat([var.kafka.consumer_group], var.kafka.tool_groups) : "${local.group_prefix}/${group}"]

  kafka_connect = {
    Sid      = "KafkaConnect"
    Effect   = "Allow"
    Action   = ["kafka-cluster:Connect", "kafka-cluster:DescribeCluster"]
    Resource = var.kafka.cluster_arn
  }

  # The producer is idempotent, so that a retry inside the client cannot publish twice.
  kafka_idempotent = {
    Sid      = "KafkaIdempotentProducer"
    Effect   = "Allow"
    Action   = ["kafka-cluster:WriteDataIdempotently"]
    Resource = var.kafka.cluster_arn
  }

  workload_secrets = {
    # Writes as ingest, reads as query (bound by row-level security), and routes to the warehouse.
    gateway = ["postgres_ingest", "postgres_query", "warehouse_reader"]
    # Drains the outbox. How far the warehouse is it reads in PostgreSQL, where the loader says so.
    relay = ["postgres_relay"]
    # Reports to PostgreSQL how far it is, and reads there what a rebuild needs.
    loader = ["postgres_loader", "warehouse_loader"]
    rollup = ["postgres_rollup"]
    # Creates schema and users, so it reads every password it sets. The warehouse's users are made by hand.
    migrate = [
      "postgres_owner", "postgres_ingest", "postgres_query", "postgres_relay", "postgres_loader", "postgres_rollup",
    ]
    # Creates and drops partitions, which is DDL.
    maintain = ["postgres_owner"]
  }

  workload_statements = {
    gateway = []
    relay = [
      local.kafka_connect,
      local.kafka_idempotent,
      {
        # It makes the topic where there is none, and reads its limit for the size of a record.
        Sid    = "PublishChanges"
        Effect = "Allow"
        Action = [
          "kafka-cluster:CreateTopic",
          "kafka-cluster:DescribeTopic",
          "kafka-cluster:DescribeTopicDynamicConfiguration",
          "kafka-cluster:WriteData",
        ]
        Resource = local.changes_topic
      },
    ]
    loader = [
      local.kafka_connect,
      local.kafka_idempotent,
      {
        Sid    = "ConsumeChanges"
        Effect = "Allow"
        Action = [
          "kafka-cluster:DescribeTopic",
          "kafka-cluster:DescribeTopicDynamicConfiguration",
          "kafka-cluster:ReadData",
        ]
        Resource = local.changes_topic
      },
      {
        # Joining and committing for the loader. The tools do neither, but MSK asks for both before it lets a
        # consumer read.
        Sid      = "Groups"
        Effect   = "Allow"
        Action   = ["kafka-cluster:AlterGroup", "kafka-cluster:DescribeGroup"]
        Resource = local.loader_groups
      },
      {
        # Made at the first dead letter. Reading back is the redrive.
        Sid    = "DeadLetters"
        Effect = "Allow"
        Action = [
          "kafka-cluster:CreateTopic",
          "kafka-cluster:DescribeTopic",
          "kafka-cluster:DescribeTopicDynamicConfiguration",
          "kafka-cluster:ReadData",
          "kafka-cluster:WriteData",
        ]
        Resource = local.dead_letter_topic
      },
      {
        Sid      = "ListStaging"
        Effect   = "Allow"
        Action   = ["s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:GetBucketLocation"]
        Resource = var.staging.bucket_arn
      },
      {
        Sid      = "WriteStaging"
        Effect   = "Allow"
        Action   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
        Resource = ["${var.staging.bucket_arn}/parquet/*", "${var.staging.bucket_arn}/manifests/*"]
      },
      {
        # Decrypt too: completing a multi-part upload reads the parts' data key.
        Sid      = "EncryptStaging"
        Effect   = "Allow"
        Action   = ["kms:GenerateDataKey", "kms:Decrypt"]
        Resource = var.staging.kms_key_arn
      },
    ]
    rollup   = []
    migrate  = []
    maintain = []
  }

  workload_policies = {
    for workload, names in local.workload_secrets : workload => jsonencode({
      Version = "2012-10-17"
      Statement = concat(
        [
          {
            Sid      = "ReadSecrets"
            Effect   = "Allow"
            Action   = ["secretsmanager:GetSecretValue", "secretsmanager:DescribeSecret"]
            Resource = [for name in names : var.secrets[name].arn]
          },
          {
            Sid      = "DecryptSecrets"
            Effect   = "Allow"
            Action   = ["kms:Decrypt"]
            Resource = distinct([for name in names : var.secrets[name].kms_key_arn])
            # The key opens secrets through Secrets Manager, not the database's storage.
            Condition = { StringLike = { "kms:ViaService" = "secretsmanager.*.amazonaws.com" } }
          },
        ],
        local.workload_statements[workload],
      )
    })
  }
}
