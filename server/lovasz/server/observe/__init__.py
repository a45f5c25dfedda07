"""What people see of the server: logs, metrics, runs and traces."""
