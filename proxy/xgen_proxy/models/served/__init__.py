"""One model on two running engines: how far apart are their next-token probabilities."""
