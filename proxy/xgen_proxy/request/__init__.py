"""What a request asks for, parsed once and checked against the limits; no I/O."""
