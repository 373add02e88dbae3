# --- Where and whose ----------------------------------------------------------------------------

variable "project" {
  description = "First part of every resource name."
  type        = string
  default     = "atlasco"

  validation {
    condition     = can(regex("^[a-z][a-z0-9]{1,11}$", var.project))
    error_message = "project must be 2 to 12 lower-case letters and digits, starting with a letter: it becomes part of bucket and database names."
  }
}

variable "environment" {
  description = "Environment, second part of every resource name. `prod` turns on the production rules."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9]{1,9}$", var.environment))
    error_message = "environment must be 2 to 10 lower-case letters and digits, for example dev, staging or prod."
  }
}

variable "region" {
  description = "AWS region. It needs three availability zones and MSK, Redshift and EKS."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region must be a region code such as eu-west-1, not an availability zone or a name."
  }
}

variable "availability_zones" {
  description = "Three zones of the region, in an order that never changes: it decides the address ranges of the subnets."
  type        = list(string)

  validation {
    condition     = length(var.availability_zones) == 3 && length(distinct(var.availability_zones)) == 3 && alltrue([for zone in var.availability_zones : can(regex("^${var.region}[a-z]$", zone))])
    error_message = "availability_zones must be three different zones of the region, for example [\"eu-west-1a\", \"eu-west-1b\", \"eu-west-1c\"]; `aws ec2 describe-availability-zones` lists them."
  }
}

variable "account_id" {
  description = "Account this environment lives in; set it so that wrong credentials are refused. Null accepts any account."
  type        = string
  default     = null

  validation {
    condition     = var.account_id == null || can(regex("^[0-9]{12}$", var.account_id))
    error_message = "account_id must be the 12 digits of an AWS account, in quotes, or null."
  }
}

variable "tags" {
  description = "Tags added to every resource, such as Owner and CostCenter."
  type        = map(string)
  default     = {}

  validation {
    condition     = length(setintersection(["Project", "Environment", "ManagedBy"], keys(var.tags))) == 0
    error_message = "tags must not contain Project, Environment or ManagedBy: Terraform sets these. Choose other names."
  }
}

variable "deletion_protection" {
  description = "Protects databases, buckets, images and secrets from deletion and keeps final snapshots."
  type        = bool

  validation {
    condition     = var.deletion_protection || var.environment != "prod"
    error_message = "deletion_protection must be true in prod: set it in prod.tfvars."
  }
}

# --- Network ------------------------------------------------------------------------------------

variable "vpc_cidr" {
  description = "Private address range of the VPC, /16 to /18. Pods take addresses from it."
  type        = string

  validation {
    condition     = can(cidrhost(var.vpc_cidr, 0)) && can(regex("/1[678]$", var.vpc_cidr))
    error_message = "vpc_cidr must be an IPv4 range of size /16, /17 or /18, for example 10.20.0.0/16: smaller ranges run out of pod addresses."
  }

  validation {
    condition     = can(regex("^(10\\.|192\\.168\\.|172\\.(1[6-9]|2[0-9]|3[01])\\.)", var.vpc_cidr))
    error_message = "vpc_cidr must lie in a private range: 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16."
  }
}

variable "nat_gateways" {
  description = "`single`: one NAT gateway, cheaper, and its zone's failure cuts the way out; `per_az`: one in each zone."
  type        = string

  validation {
    condition     = contains(["single", "per_az"], var.nat_gateways)
    error_message = "nat_gateways must be single or per_az."
  }

  validation {
    condition     = var.environment != "prod" || var.nat_gateways == "per_az"
    error_message = "nat_gateways must be per_az in prod, or one zone's failure takes the way out from all: set it in prod.tfvars."
  }
}

variable "interface_endpoints" {
  description = "AWS services reached inside the VPC. The default five carry image pulls, secrets, logs and role tokens; each costs by the hour and zone."
  type        = set(string)
  default     = ["ecr.api", "ecr.dkr", "secretsmanager", "logs", "sts"]

  validation {
    condition     = length(setsubtract(["ecr.api", "ecr.dkr", "secretsmanager", "logs", "sts"], var.interface_endpoints)) == 0
    error_message = "interface_endpoints must keep ecr.api, ecr.dkr, secretsmanager, logs and sts; add to them, do not remove."
  }
}

# --- PostgreSQL ---------------------------------------------------------------------------------

variable "postgres" {
  description = <<-EOT
    RDS for PostgreSQL.
    topology: `instance` (one, single zone) or `multi_az_cluster` (a writer and two readable standbys).
    engine_version: major version (minor ones follow by themselves), 16 or newer.
    instance_class: a Multi-AZ DB cluster needs a class with local disk (db.m6gd, db.r6gd, …).
    storage_type, allocated_storage_gib, iops: gp3 for `instance`; io2 with iops for `multi_az_cluster`.
    max_allocated_storage_gib: limit of automatic growth (`instance` only; a cluster does not grow by itself).
    max_connections: pools of all pods and some spare.
    max_wal_size_mib: log between checkpoints; see modules/postgres/parameters.tf.
    backup_retention_days: reach of point-in-time recovery.
    performance_insights_days: 7 is free of charge; or a multiple of 31, up to 731.
    monitoring_interval_seconds: enhanced monitoring.
    apply_immediately: changes now instead of in the maintenance window.
  EOT
  type = object({
    topology                     = string
    engine_version               = optional(string, "17")
    instance_class               = string
    storage_type                 = optional(string, "gp3")
    allocated_storage_gib        = number
    max_allocated_storage_gib    = optional(number, 1000)
    iops                         = optional(number, 0)
    database_name                = optional(string, "atlasco")
    owner_username               = optional(string, "atlasco_owner")
    max_connections              = optional(number, 200)
    max_wal_size_mib             = optional(number, 4096)
    backup_retention_days        = optional(number, 7)
    performance_insights_days    = optional(number, 7)
    monitoring_interval_seconds  = optional(number, 60)
    apply_immediately            = optional(bool, false)
    preferred_backup_window      = optional(string, "02:00-03:00")
    preferred_maintenance_window = optional(string, "sun:03:30-sun:04:30")
  })

  validation {
    condition     = contains(["instance", "multi_az_cluster"], var.postgres.topology)
    error_message = "postgres.topology must be instance or multi_az_cluster."
  }

  validation {
    condition     = var.environment != "prod" || var.postgres.topology == "multi_az_cluster"
    error_message = "postgres.topology must be multi_az_cluster in prod: a single instance has neither a standby nor a replica to read from."
  }

  validation {
    condition     = can(regex("^(1[6-9]|[2-9][0-9])(\\.[0-9]+)?$", var.postgres.engine_version))
    error_message = "postgres.engine_version must be 16 or newer, as a major version in quotes (\"17\") or with a minor (\"17.6\")."
  }

  validation {
    condition     = var.postgres.topology != "multi_az_cluster" || can(regex("^db\\.[a-z0-9]+d\\.", var.postgres.instance_class))
    error_message = "postgres.instance_class must be a class with local disk for multi_az_cluster, for example db.r6gd.2xlarge or db.m6gd.large."
  }

  validation {
    condition     = can(regex("^db\\.", var.postgres.instance_class))
    error_message = "postgres.instance_class must be an RDS class, starting with db., for example db.t4g.medium."
  }

  validation {
    condition     = contains(["gp3", "io1", "io2"], var.postgres.storage_type)
    error_message = "postgres.storage_type must be gp3, io1 or io2."
  }

  validation {
    condition     = var.postgres.allocated_storage_gib >= 20 && (var.postgres.topology != "multi_az_cluster" || var.postgres.allocated_storage_gib >= 100)
    error_message = "postgres.allocated_storage_gib must be at least 20, and at least 100 for multi_az_cluster."
  }

  validation {
    condition     = var.postgres.backup_retention_days >= 1 && var.postgres.backup_retention_days <= 35
    error_message = "postgres.backup_retention_days must be 1 to 35: zero would turn off point-in-time recovery."
  }

  validation {
    condition     = var.environment != "prod" || var.postgres.backup_retention_days >= 14
    error_message = "postgres.backup_retention_days must be at least 14 in prod: a fault in the data is often found only the week after."
  }

  validation {
    condition     = var.postgres.performance_insights_days == 7 || var.postgres.performance_insights_days == 731 || (var.postgres.performance_insights_days >= 31 && var.postgres.performance_insights_days % 31 == 0)
    error_message = "postgres.performance_insights_days must be 7, a multiple of 31, or 731."
  }

  validation {
    condition     = contains([1, 5, 10, 15, 30, 60], var.postgres.monitoring_interval_seconds)
    error_message = "postgres.monitoring_interval_seconds must be 1, 5, 10, 15, 30 or 60."
  }

  validation {
    condition     = var.postgres.max_connections >= 50 && var.postgres.max_connections <= 2000
    error_message = "postgres.max_connections must be 50 to 2000: fewer cannot serve the pools, more make every snapshot slow; put a pooler in front instead."
  }

  validation {
    condition     = var.postgres.max_wal_size_mib >= 1024 && var.postgres.max_wal_size_mib * 4 <= var.postgres.allocated_storage_gib * 1024
    error_message = "postgres.max_wal_size_mib must be at least 1024 and at most a quarter of allocated_storage_gib, or the log fills the disk."
  }
}

# --- Kafka --------------------------------------------------------------------------------------

variable "kafka" {
  description = <<-EOT
    MSK.
    version: as MSK writes it (`3.9.x.kraft`).
    broker_count: 2, or a multiple of 3. replication_factor, min_insync_replicas: prod needs at least 3 and 2.
    storage_gib, max_storage_gib: of each broker; storage grows by itself up to the second.
    partitions: of the changes topic; fixed for the topic's life, because records are keyed by bucket.
    retention_hours: how long the loader may be down before a gap has to be reloaded from PostgreSQL.
    enhanced_monitoring: PER_BROKER or finer; the alarms need it.
  EOT
  type = object({
    version             = optional(string, "3.9.x.kraft")
    broker_count        = number
    instance_type       = string
    storage_gib         = number
    max_storage_gib     = number
    replication_factor  = number
    min_insync_replicas = number
    partitions          = number
    retention_hours     = optional(number, 168)
    enhanced_monitoring = optional(string, "PER_BROKER")
  })

  validation {
    condition     = var.kafka.broker_count == 2 || (var.kafka.broker_count >= 3 && var.kafka.broker_count % 3 == 0)
    error_message = "kafka.broker_count must be 2 or a multiple of 3, so that every zone has the same number of brokers."
  }

  validation {
    condition     = can(regex("^kafka\\.", var.kafka.instance_type))
    error_message = "kafka.instance_type must be an MSK type, for example kafka.t3.small or kafka.m7g.large."
  }

  validation {
    condition     = var.kafka.replication_factor >= 1 && var.kafka.replication_factor <= var.kafka.broker_count
    error_message = "kafka.replication_factor must be at least 1 and at most kafka.broker_count."
  }

  validation {
    condition     = var.kafka.min_insync_replicas >= 1 && (var.kafka.min_insync_replicas < var.kafka.replication_factor || var.kafka.replication_factor == 1)
    error_message = "kafka.min_insync_replicas must be at least 1 and below replication_factor, or one broker's restart stops publishing."
  }

  validation {
    condition     = var.environment != "prod" || (var.kafka.min_insync_replicas >= 2 && var.kafka.replication_factor >= 3)
    error_message = "kafka needs replication_factor 3 and min_insync_replicas 2 in prod: with less, one lost broker can take published records along."
  }

  validation {
    condition     = var.kafka.max_storage_gib >= var.kafka.storage_gib && var.kafka.storage_gib >= 10
    error_message = "kafka.storage_gib must be at least 10 and max_storage_gib no smaller than it."
  }

  validation {
    condition     = var.kafka.partitions >= 1 && var.kafka.partitions <= 1000
    error_message = "kafka.partitions must be 1 to 1000; choose for the life of the topic."
  }

  validation {
    condition     = var.kafka.retention_hours >= 24
    error_message = "kafka.retention_hours must be at least 24, so that a loader that fails overnight still finds its records."
  }

  validation {
    condition     = contains(["PER_BROKER", "PER_TOPIC_PER_BROKER", "PER_TOPIC_PER_PARTITION"], var.kafka.enhanced_monitoring)
    error_message = "kafka.enhanced_monitoring must be PER_BROKER, PER_TOPIC_PER_BROKER or PER_TOPIC_PER_PARTITION: the alarms read metrics that DEFAULT does not have."
  }
}

# --- Warehouse ----------------------------------------------------------------------------------

variable "warehouse" {
  description = <<-EOT
    Redshift.
    kind: `cluster` (node_type, node_count, concurrency_scaling_*) or `serverless` (base_capacity_rpu, max_capacity_rpu, daily_rpu_hours).
    daily_rpu_hours: compute of a day after which serverless stops answering until midnight UTC.
    concurrency_scaling_minutes: of a day; 60 are free of charge.
    snapshot_retention_days: automated snapshots of the cluster.
  EOT
  type = object({
    kind                        = string
    database_name               = optional(string, "atlasco")
    admin_username              = optional(string, "atlasco_admin")
    node_type                   = optional(string, "ra3.large")
    node_count                  = optional(number, 2)
    base_capacity_rpu           = optional(number, 8)
    max_capacity_rpu            = optional(number, 16)
    daily_rpu_hours             = optional(number, 48)
    snapshot_retention_days     = optional(number, 7)
    concurrency_scaling_max     = optional(number, 1)
    concurrency_scaling_minutes = optional(number, 60)
    maintenance_window          = optional(string, "sun:04:30-sun:05:30")
  })

  validation {
    condition     = contains(["cluster", "serverless"], var.warehouse.kind)
    error_message = "warehouse.kind must be cluster or serverless."
  }

  validation {
    condition     = var.environment != "prod" || var.warehouse.kind == "cluster"
    error_message = "warehouse.kind must be cluster in prod: a loader that writes around the clock keeps serverless awake and pays its price for every second."
  }

  validation {
    condition     = contains(["ra3.large", "ra3.xlplus", "ra3.4xlarge", "ra3.16xlarge"], var.warehouse.node_type)
    error_message = "warehouse.node_type must be an RA3 type: ra3.large, ra3.xlplus, ra3.4xlarge or ra3.16xlarge."
  }

  validation {
    condition     = var.environment != "prod" || var.warehouse.kind != "cluster" || var.warehouse.node_count >= 2
    error_message = "warehouse.node_count must be at least 2 in prod: a single node is restored from a snapshot when it fails."
  }

  validation {
    condition     = var.warehouse.base_capacity_rpu >= 8 && var.warehouse.base_capacity_rpu % 8 == 0 && var.warehouse.max_capacity_rpu >= var.warehouse.base_capacity_rpu
    error_message = "warehouse.base_capacity_rpu must be a multiple of 8 and max_capacity_rpu no smaller than it."
  }

  validation {
    condition     = var.warehouse.snapshot_retention_days >= 1 && var.warehouse.snapshot_retention_days <= 35
    error_message = "warehouse.snapshot_retention_days must be 1 to 35."
  }
}

variable "staging" {
  description = <<-EOT
    Bucket between loader and warehouse.
    parquet_retention_days: how far back the warehouse can be rebuilt from kept Parquet.
    manifest_retention_days: manifests are only read while loading.
    noncurrent_days: how long a file deleted by mistake can be brought back.
  EOT
  type = object({
    parquet_retention_days  = number
    manifest_retention_days = optional(number, 30)
    noncurrent_days         = optional(number, 7)
  })

  validation {
    condition     = var.staging.parquet_retention_days >= 7 && var.staging.manifest_retention_days >= 1 && var.staging.noncurrent_days >= 1
    error_message = "staging.parquet_retention_days must be at least 7, manifest_retention_days and noncurrent_days at least 1: files must outlive the longest query and the loader's retries."
  }
}

# --- Kubernetes ---------------------------------------------------------------------------------

variable "cluster" {
  description = <<-EOT
    EKS.
    public_access_cidrs: addresses that reach the Kubernetes API over the internet; empty means only from inside the VPC.
    admin_arns: IAM roles or users, besides the creator, that administer the cluster.
    container_insights: node metrics and container logs in CloudWatch (billed by volume).
    node_groups: by name; sizes are the bounds of the cluster autoscaler.
  EOT
  type = object({
    version             = optional(string, "1.34")
    public_access_cidrs = optional(list(string), [])
    admin_arns          = optional(list(string), [])
    container_insights  = optional(bool, false)
    node_groups = map(object({
      instance_types = list(string)
      ami_type       = optional(string, "AL2023_x86_64_STANDARD")
      capacity_type  = optional(string, "ON_DEMAND")
      min_size       = number
      desired_size   = number
      max_size       = number
      disk_gib       = optional(number, 50)
    }))
  })

  validation {
    condition     = can(regex("^1\\.[0-9]{2}$", var.cluster.version)) && try(tonumber(split(".", var.cluster.version)[1]) >= 30, false)
    error_message = "cluster.version must be 1.30 or newer, in quotes: the gateway's drain uses the sleep hook that older versions lack."
  }

  validation {
    condition     = alltrue([for cidr in var.cluster.public_access_cidrs : can(cidrhost(cidr, 0)) && try(tonumber(split("/", cidr)[1]) >= 8, false)])
    error_message = "cluster.public_access_cidrs must be IPv4 ranges of /8 or narrower; 0.0.0.0/0 is refused. List your office or VPN addresses, for example 203.0.113.7/32."
  }

  validation {
    condition     = alltrue([for arn in var.cluster.admin_arns : can(regex("^arn:[a-z-]+:iam::[0-9]{12}:(role|user)/", arn))])
    error_message = "cluster.admin_arns must be ARNs of IAM roles or users, for example arn:aws:iam::123456789012:role/operators."
  }

  validation {
    condition     = length(var.cluster.node_groups) > 0 && alltrue([for group in values(var.cluster.node_groups) : group.min_size >= 1 && group.min_size <= group.desired_size && group.desired_size <= group.max_size])
    error_message = "cluster.node_groups must hold at least one group, each with 1 <= min_size <= desired_size <= max_size."
  }

  validation {
    condition     = alltrue([for group in values(var.cluster.node_groups) : contains(["ON_DEMAND", "SPOT"], group.capacity_type)])
    error_message = "cluster.node_groups: capacity_type must be ON_DEMAND or SPOT."
  }

  validation {
    condition     = var.environment != "prod" || alltrue([for group in values(var.cluster.node_groups) : group.capacity_type == "ON_DEMAND" && group.min_size >= 3])
    error_message = "cluster.node_groups must be ON_DEMAND with min_size of at least 3 in prod: one node for each zone, and none that AWS takes back while devices stream to it."
  }
}

variable "namespace" {
  description = "Kubernetes namespace of the platform's workloads."
  type        = string
  default     = "atlasco"

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.namespace))
    error_message = "namespace must be a Kubernetes name: lower-case letters, digits and dashes."
  }
}

variable "kept_images" {
  description = "Container images kept in the registry."
  type        = number
  default     = 30

  validation {
    condition     = var.kept_images >= 5
    error_message = "kept_images must be at least 5, or a rollback finds its image expired."
  }
}

variable "password_version" {
  description = "Raise by one to make new passwords for the database users Terraform manages; run the migration job afterwards, and ALTER USER in the warehouse."
  type        = number
  default     = 1

  validation {
    condition     = var.password_version >= 1 && floor(var.password_version) == var.password_version
    error_message = "password_version must be a whole number from 1; raise it to rotate."
  }
}

# --- Observation and cost -----------------------------------------------------------------------

variable "alert_emails" {
  description = "Addresses that get alarms, database events and budget warnings; each confirms a message once."
  type        = set(string)
  default     = []

  validation {
    condition     = alltrue([for email in var.alert_emails : can(regex("^[^@\\s]+@[^@\\s]+\\.[^@\\s]+$", email))])
    error_message = "alert_emails must be e-mail addresses."
  }

  validation {
    condition     = var.environment != "prod" || length(var.alert_emails) > 0
    error_message = "alert_emails must name at least one address in prod, or alarms reach nobody."
  }
}

variable "monthly_budget_usd" {
  description = "Monthly cost of the account, in US dollars, at which the budget warns (80% actual, 100% forecast)."
  type        = number

  validation {
    condition     = var.monthly_budget_usd > 0
    error_message = "monthly_budget_usd must be above zero; docs/aws-terraform.md says what an environment consists of."
  }
}

variable "log_retention_days" {
  description = "Days that flow, database, broker, audit and control plane logs are kept."
  type        = number

  validation {
    condition     = contains([7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731], var.log_retention_days)
    error_message = "log_retention_days must be a period CloudWatch Logs offers: 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545 or 731."
  }

  validation {
    condition     = var.environment != "prod" || var.log_retention_days >= 365
    error_message = "log_retention_days must be at least 365 in prod, so that an incident found late can still be traced."
  }
}
