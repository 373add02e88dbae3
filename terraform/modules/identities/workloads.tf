# What each workload may do. The rule: what a process needs to do its own part of the flow, named by
# ARN; a right that is missing here fails loudly, one too many is never noticed.
#
#              PostgreSQL         Kafka                         S3          warehouse
#   gateway    ingest, query      –                             –           reader
#   relay      ingest             write changes, see progress   –           reader
#   loader     ingest             read changes, write rejects   read/write  loader
#   rollup     ingest             –                             –           –
#   migrate    owner, sets users  create topics                 –           administrator, sets users
#   maintain   owner              –                             –           reader

locals {
  # MSK names a topic after its cluster: …:cluster/<name>/<uuid> becomes …:topic/<name>/<uuid>/<topic>.
  topic_prefix      = replace(var.kafka.cluster_arn, ":cluster/", ":topic/")
  group_prefix      = replace(var.kafka.cluster_arn, ":cluster/", ":group/")
  changes_topic     = "${local.topic_prefix}/${var.kafka.changes_topic}"
  dead_letter_topic = "${local.topic_prefix}/${var.kafka.dead_letter_topic}"
  loader_group      = "${local.group_prefix}/${var.kafka.consumer_group}"

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
    # Drains the outbox, and retires only what the warehouse reports as loaded.
    relay = ["postgres_ingest", "warehouse_reader"]
    # Reloads from PostgreSQL what a gap in the topic lost. RLS binds query, so that reads as ingest.
    loader = ["postgres_ingest", "warehouse_loader"]
    rollup = ["postgres_ingest"]
    # Creates schema and users in both databases, so it reads every password it sets.
    migrate = [
      "postgres_owner", "postgres_ingest", "postgres_query",
      "warehouse_admin", "warehouse_loader", "warehouse_reader",
    ]
    # Creates and drops partitions, which is DDL; drops what has been loaded.
    maintain = ["postgres_owner", "warehouse_reader"]
  }

  workload_statements = {
    gateway = []
    relay = [
      local.kafka_connect,
      local.kafka_idempotent,
      {
        Sid      = "PublishChanges"
        Effect   = "Allow"
        Action   = ["kafka-cluster:WriteData", "kafka-cluster:DescribeTopic"]
        Resource = local.changes_topic
      },
      {
        Sid      = "SeeHowFarTheLoaderIs"
        Effect   = "Allow"
        Action   = ["kafka-cluster:DescribeGroup"]
        Resource = local.loader_group
      },
    ]
    loader = [
      local.kafka_connect,
      local.kafka_idempotent,
      {
        Sid      = "ConsumeChanges"
        Effect   = "Allow"
        Action   = ["kafka-cluster:ReadData", "kafka-cluster:DescribeTopic"]
        Resource = local.changes_topic
      },
      {
        Sid      = "CommitOffsets"
        Effect   = "Allow"
        Action   = ["kafka-cluster:AlterGroup", "kafka-cluster:DescribeGroup"]
        Resource = local.loader_group
      },
      {
        # Reading back is the redrive.
        Sid      = "DeadLetters"
        Effect   = "Allow"
        Action   = ["kafka-cluster:WriteData", "kafka-cluster:ReadData", "kafka-cluster:DescribeTopic"]
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
    rollup = []
    migrate = [
      local.kafka_connect,
      {
        Sid    = "MakeTopics"
        Effect = "Allow"
        Action = [
          "kafka-cluster:CreateTopic",
          "kafka-cluster:DescribeTopic",
          "kafka-cluster:AlterTopicDynamicConfiguration",
          "kafka-cluster:DescribeTopicDynamicConfiguration",
        ]
        Resource = [local.changes_topic, local.dead_letter_topic]
      },
    ]
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
