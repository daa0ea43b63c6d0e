"""What llama-cpp-python's server needs done for it: field types, JSON schemas, stop strings and usage."""
