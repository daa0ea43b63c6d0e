"""Real clients, from PyPI and npm, in front of a real proxy. Only the words of the model behind it are scripted."""
