"""The settings: fields, defaults, sources and their checks."""
