"""What a model is, what memory it needs, and whether this machine has it."""
