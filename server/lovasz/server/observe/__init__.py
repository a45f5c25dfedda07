"""What people see of the server: logs, metrics, runs, shares of the device, steps that wait, and traces."""
