"""The answers of the opaque endpoints, which pass as they come."""
