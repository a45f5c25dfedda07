"""The Triton backend: kernels for a GPU, and the host code that lays out their buffers and launches them."""
