"""The gRPC service around ``lovasz.core``."""
