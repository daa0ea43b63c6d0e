"""What /models/status tells beyond the load: the KV cache, the model, the GPUs."""
