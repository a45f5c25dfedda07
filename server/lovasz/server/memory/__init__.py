"""Host memory for the tensors of requests: where it comes from, and when it is given back."""
