"""Models: fetched, inspected, quantised and compared. The proxy that serves imports none of it."""
