"""The file format: a layout, a header, and the codes between; see `docs/format.md`."""
