"""Codes and scales of concrete arrays of any shape, by two programs for parts of one size."""
