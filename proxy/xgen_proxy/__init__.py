"""xgen-proxy: one OpenAI-compatible door in front of vLLM (GPU) and llama.cpp (CPU)."""

__version__ = "0.1.0"
