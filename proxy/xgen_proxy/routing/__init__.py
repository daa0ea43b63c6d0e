"""Which replicas may serve a request, in which order, and why; no I/O."""
