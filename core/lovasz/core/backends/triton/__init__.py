"""The kernels of the GPU's path, in Triton. ``batch`` places the tensors of a batch for them."""
