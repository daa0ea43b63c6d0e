"""Whether backends that serve the same model name serve the same model."""
