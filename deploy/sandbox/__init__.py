"""A stand-in for a Docker engine and a registry: podman and buildah, in namespaces and folders of their own."""
