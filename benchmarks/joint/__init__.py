"""A joint step of several ranks, beside one request that holds all their tensors."""
