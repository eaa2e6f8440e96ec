"""Searches for the scale, and the zero point, of least squared error on a grid."""
