"""`xgen-proxy launch`: what a client must be told so that it uses this proxy."""
