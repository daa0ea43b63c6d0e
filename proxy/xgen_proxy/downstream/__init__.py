"""The client's side of the connection: requests in, responses out."""
