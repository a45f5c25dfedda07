"""Memory for the tensors of requests, on the host and on the device: where it comes from, how tensors get there, and
when it is given back."""
