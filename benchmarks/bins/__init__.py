"""Errors of loss and gradient by counting, for other numbers of bins than the one in use."""
