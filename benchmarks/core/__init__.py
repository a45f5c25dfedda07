"""The loss in process, beside the usual implementation and PyTorch's cross-entropy."""
