"""The file format, byte by byte as in `docs/format.md`: layout, codes and header.

`file = length + header + tensors`; a plan of it follows from shapes and dtypes alone.
"""
