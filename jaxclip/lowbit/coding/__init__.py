"""Entropy coding of codes, and the trellis whose paths make them worth more."""
