"""The coding agents of the matrix."""
