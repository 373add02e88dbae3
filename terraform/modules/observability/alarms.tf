# Alarms on the services AWS runs. What the processes themselves measure (outbox age, loop lag, rejected
# readings) is watched by the monitoring inside the cluster.
#
# Each description says what it means and where to look first: it is the text of the message on the pager.

locals {
  gib = 1024 * 1024 * 1024

  postgres_alarms = merge([
    for id in var.postgres.instance_ids : {
      "postgres-cpu-${id}" = {
        description = "PostgreSQL ${id} has been above 80% CPU for 15 minutes; ingest will push back soon. Look at the top statements in Performance Insights; scale the instance class if they are expected."
        namespace   = "AWS/RDS", metric = "CPUUtilization", dimensions = { DBInstanceIdentifier = id }
        statistic   = "Average", comparison = "GreaterThanThreshold", threshold = 80, period = 300, periods = 3
      }
      "postgres-storage-${id}" = {
        description = "PostgreSQL ${id} has less than 20% of its storage free. Check that partitions retire and that the outbox drains; then raise allocated_storage_gib (a Multi-AZ DB cluster does not grow by itself)."
        namespace   = "AWS/RDS", metric = "FreeStorageSpace", dimensions = { DBInstanceIdentifier = id }
        statistic   = "Minimum", comparison = "LessThanThreshold", threshold = floor(var.postgres.allocated_storage_gib * local.gib * 0.2), period = 300, periods = 3
      }
      "postgres-memory-${id}" = {
        description = "PostgreSQL ${id} has less than 256 MiB of memory to free. Look for many sessions with large sorts; the next step is the kernel ending the server."
        namespace   = "AWS/RDS", metric = "FreeableMemory", dimensions = { DBInstanceIdentifier = id }
        statistic   = "Minimum", comparison = "LessThanThreshold", threshold = 256 * 1024 * 1024, period = 300, periods = 3
      }
      "postgres-connections-${id}" = {
        description = "PostgreSQL ${id} uses more than 80% of max_connections. Compare the pool sizes times the number of pods with max_connections."
        namespace   = "AWS/RDS", metric = "DatabaseConnections", dimensions = { DBInstanceIdentifier = id }
        statistic   = "Maximum", comparison = "GreaterThanThreshold", threshold = floor(var.postgres.max_connections * 0.8), period = 300, periods = 3
      }
      "postgres-transaction-ids-${id}" = {
        description = "PostgreSQL ${id} has used half of its transaction ids since the last freeze. Find what holds back vacuum (an old transaction, a prepared transaction, a replication slot); at two billion writes stop."
        namespace   = "AWS/RDS", metric = "MaximumUsedTransactionIDs", dimensions = { DBInstanceIdentifier = id }
        statistic   = "Maximum", comparison = "GreaterThanThreshold", threshold = 1000000000, period = 300, periods = 1
      }
      "postgres-write-latency-${id}" = {
        description = "Writes of PostgreSQL ${id} have taken more than 20 ms on average for 15 minutes; every acknowledgement waits for one. Compare WriteIOPS and throughput with what the storage provides."
        namespace   = "AWS/RDS", metric = "WriteLatency", dimensions = { DBInstanceIdentifier = id }
        statistic   = "Average", comparison = "GreaterThanThreshold", threshold = 0.02, period = 300, periods = 3
      }
    }
  ]...)

  # The writer reports no lag of its own, so the alarm covers all members of the cluster.
  replica_alarms = merge([
    for id in var.postgres.has_standbys ? var.postgres.instance_ids : [] : {
      "postgres-replica-lag-${id}" = {
        description = "Standby ${id} has been more than 10 s behind for 5 minutes. Answers stay right: the router asks the primary instead, which carries the load of the dashboards now. Look for long queries on the standby and for write bursts."
        namespace   = "AWS/RDS", metric = "ReplicaLag", dimensions = { DBInstanceIdentifier = id }
        statistic   = "Maximum", comparison = "GreaterThanThreshold", threshold = 10, period = 60, periods = 5
      }
    }
  ]...)

  kafka_alarms = merge(
    {
      "kafka-offline-partitions" = {
        description = "Kafka partitions without a leader: the relay cannot publish to them, the outbox in PostgreSQL grows. Nothing is lost. Look at the broker logs and the health of the brokers."
        namespace   = "AWS/Kafka", metric = "OfflinePartitionsCount", dimensions = { "Cluster Name" = var.kafka.cluster_name }
        statistic   = "Maximum", comparison = "GreaterThanThreshold", threshold = 0, period = 60, periods = 3
      }
      "kafka-controller" = {
        description = "Kafka has had no active controller for 5 minutes; no partition can change its leader. Look at the broker logs; open a case with AWS."
        namespace   = "AWS/Kafka", metric = "ActiveControllerCount", dimensions = { "Cluster Name" = var.kafka.cluster_name }
        statistic   = "Maximum", comparison = "LessThanThreshold", threshold = 1, period = 60, periods = 5
      }
      "kafka-loader-lag" = {
        description = "The loader is more than 5 minutes behind the topic; analytics answers grow stale and say so. Look at the loader's logs, then at the warehouse."
        namespace   = "AWS/Kafka", metric = "EstimatedMaxTimeLag"
        dimensions = {
          "Cluster Name"   = var.kafka.cluster_name
          "Consumer Group" = var.kafka.consumer_group
          "Topic"          = var.kafka.changes_topic
        }
        statistic = "Maximum", comparison = "GreaterThanThreshold", threshold = 300, period = 60, periods = 5
      }
    },
    [
      for broker in range(1, var.kafka.broker_count + 1) : {
        "kafka-disk-${broker}" = {
          description = "Broker ${broker} has used more than 75% of its disk although storage should grow at 60%. Check the limit of the storage autoscaling and the retention of the topics."
          namespace   = "AWS/Kafka", metric = "KafkaDataLogsDiskUsed", dimensions = { "Cluster Name" = var.kafka.cluster_name, "Broker ID" = tostring(broker) }
          statistic   = "Maximum", comparison = "GreaterThanThreshold", threshold = 75, period = 300, periods = 2
        }
        "kafka-under-replicated-${broker}" = {
          description = "Broker ${broker} leads partitions that lack replicas; one more failure and publishing stops. A rolling patch causes this for minutes; look at the broker logs if it lasts."
          namespace   = "AWS/Kafka", metric = "UnderReplicatedPartitions", dimensions = { "Cluster Name" = var.kafka.cluster_name, "Broker ID" = tostring(broker) }
          statistic   = "Maximum", comparison = "GreaterThanThreshold", threshold = 0, period = 300, periods = 4
        }
      }
    ]...
  )

  # Serverless has no health to watch; its usage limit bounds the cost, and the loader's lag above shows
  # when it does not take loads.
  warehouse_alarms = {
    for alarm, spec in {
      "warehouse-health" = {
        description = "The warehouse has been unhealthy for 5 minutes; analytics fall back or are refused, the loader waits. Look at the cluster's events."
        namespace   = "AWS/Redshift", metric = "HealthStatus", dimensions = { ClusterIdentifier = var.warehouse.identifier }
        statistic   = "Minimum", comparison = "LessThanThreshold", threshold = 1, period = 60, periods = 5
      }
      "warehouse-storage" = {
        description = "The warehouse has used more than 80% of its storage. Check retention and compaction, then add nodes."
        namespace   = "AWS/Redshift", metric = "PercentageDiskSpaceUsed", dimensions = { ClusterIdentifier = var.warehouse.identifier }
        statistic   = "Maximum", comparison = "GreaterThanThreshold", threshold = 80, period = 300, periods = 3
      }
      "warehouse-cpu" = {
        description = "The warehouse has been above 90% CPU for 30 minutes. Look at the longest queries in the read queue and at the concurrency scaling limit."
        namespace   = "AWS/Redshift", metric = "CPUUtilization", dimensions = { ClusterIdentifier = var.warehouse.identifier }
        statistic   = "Average", comparison = "GreaterThanThreshold", threshold = 90, period = 300, periods = 6
      }
    } : alarm => spec if var.warehouse.kind == "cluster"
  }

  nat_alarms = {
    for zone, id in var.nat_gateway_ids : "nat-ports-${zone}" => {
      description = "The NAT gateway in ${zone} ran out of ports; connections to the internet fail. Look for a workload that opens many connections to one address."
      namespace   = "AWS/NATGateway", metric = "ErrorPortAllocation", dimensions = { NatGatewayId = id }
      statistic   = "Sum", comparison = "GreaterThanThreshold", threshold = 0, period = 300, periods = 1
    }
  }

  node_alarms = {
    for cluster in var.container_insights_cluster == null ? [] : [var.container_insights_cluster] : "cluster-failed-nodes" => {
      description = "A Kubernetes node has been failed for 10 minutes. Look at `kubectl describe node` and the node group's health issues."
      namespace   = "ContainerInsights", metric = "cluster_failed_node_count", dimensions = { ClusterName = cluster }
      statistic   = "Maximum", comparison = "GreaterThanThreshold", threshold = 0, period = 300, periods = 2
    }
  }

  alarms = merge(
    local.postgres_alarms,
    local.replica_alarms,
    local.kafka_alarms,
    local.warehouse_alarms,
    local.nat_alarms,
    local.node_alarms,
  )
}

resource "aws_cloudwatch_metric_alarm" "this" {
  for_each = local.alarms

  alarm_name        = "${var.name}-${each.key}"
  alarm_description = each.value.description

  namespace           = each.value.namespace
  metric_name         = each.value.metric
  dimensions          = each.value.dimensions
  statistic           = each.value.statistic
  comparison_operator = each.value.comparison
  threshold           = each.value.threshold
  period              = each.value.period
  evaluation_periods  = each.value.periods

  # A gap in the data is not an all-clear: the alarm keeps its state. New services report late.
  treat_missing_data = "missing"

  alarm_actions = [aws_sns_topic.alerts.arn]
  ok_actions    = [aws_sns_topic.alerts.arn]
}
