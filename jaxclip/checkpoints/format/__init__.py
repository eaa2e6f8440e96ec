"""The file format of `docs/format.md`, byte by byte: layout, codes and header.

`file = length + header + tensors`; a plan of the file follows from shapes and dtypes alone.
"""
