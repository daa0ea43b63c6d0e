"""xgen-proxy: an OpenAI-compatible proxy over vLLM (GPU) and llama.cpp (CPU)."""

__version__ = "0.1.0"
