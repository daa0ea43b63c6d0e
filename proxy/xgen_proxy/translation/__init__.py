"""Other APIs, translated at the edge: their requests become chat completions, and chat completions their answers."""
