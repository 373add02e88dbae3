"""What every process stands on: configuration, logs, metrics, an admin port, a clean end."""
