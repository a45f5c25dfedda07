"""The HTTP port: metrics for Prometheus, and a status page for people."""
