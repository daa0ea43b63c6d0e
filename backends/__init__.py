"""Prepare and start backends on this machine. The proxy never imports this package."""
