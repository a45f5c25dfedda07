"""Manifests for Kubernetes, and what is made for them from other files."""
