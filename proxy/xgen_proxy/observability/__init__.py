"""Metrics, the request log and traces, all observers of a request's outcome."""
