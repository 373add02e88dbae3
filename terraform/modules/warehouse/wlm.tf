# Workload management of the provisioned cluster: automatic memory and concurrency, explicit priorities.
# A database group decides the queue, so the users are made in the groups named here (docs/deploy-aws.md).

locals {
  wlm = [
    {
      # Loading decides how fresh every other answer is, and its queries are few and short.
      name                = "load"
      user_group          = ["atlasco_load"]
      query_group         = []
      auto_wlm            = true
      queue_type          = "auto"
      priority            = "highest"
      concurrency_scaling = "off"
    },
    {
      # Analytics arrive in bursts; what does not fit goes to a scaling cluster, within the usage limit.
      name                = "read"
      user_group          = ["atlasco_read"]
      query_group         = []
      auto_wlm            = true
      queue_type          = "auto"
      priority            = "normal"
      concurrency_scaling = "auto"
      rules = [{
        # The router's largest tier allows 15 minutes of staleness; a query that runs longer than that
        # answers nobody and keeps compaction from removing files.
        rule_name = "abort_after_15_minutes"
        predicate = [{ metric_name = "query_execution_time", operator = ">", value = 900 }]
        action    = "abort"
      }]
    },
    {
      # Operators.
      name                = "other"
      user_group          = []
      query_group         = []
      auto_wlm            = true
      queue_type          = "auto"
      priority            = "low"
      concurrency_scaling = "off"
    },
    { short_query_queue = true },
  ]
}
