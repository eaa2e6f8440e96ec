"""Shared helpers: checks, trees, exact float arithmetic, grids, atomic files, optional packages."""
