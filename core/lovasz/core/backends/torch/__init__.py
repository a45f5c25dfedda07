"""The torch backend: any device and element type, including float64. Sorts all segments."""
