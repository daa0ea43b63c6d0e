"""Model files as they lie on the disk: GGUF, and Hugging Face's directories."""
