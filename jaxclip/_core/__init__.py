"""Ground floor: checks, trees, exact float arithmetic, grids, atomic files, optional packages."""
