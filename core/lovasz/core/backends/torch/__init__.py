"""Torch alone: any device and element type, float64 too. Segments are sorted."""
