"""The remote call, beside plain sockets, a bare gRPC server and NVIDIA's Triton Inference Server."""
