"""The torch backend: any device and element type, including float64. Sorts all segments.

``compute`` (a batch), ``flat`` (its tensors, one row a class), ``softmax``, ``cross_entropy``, ``binary`` (sigmoid and
binary cross-entropy), ``segments`` (the Lovász extension of all segments at once).
"""
