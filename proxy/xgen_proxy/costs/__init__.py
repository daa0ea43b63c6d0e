"""What requests and tokens cost, from measurements and a table of prices. The proxy that serves imports none of it."""
