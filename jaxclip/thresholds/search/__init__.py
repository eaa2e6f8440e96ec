"""Searches for the scale, and zero point, of least squared error on a grid."""
