"""The benchmark: what the platform does on one machine, against what PostgreSQL alone could do there."""
