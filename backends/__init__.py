"""Starts and prepares backends on this machine. The proxy never imports this: they meet over HTTP only."""
