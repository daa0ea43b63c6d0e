"""The backends and their replicas: discovery, health, load and slots."""
