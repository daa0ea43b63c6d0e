"""Gets the response of a plan: attempts, failover, delivery and resumption."""
