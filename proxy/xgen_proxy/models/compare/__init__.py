"""Quantised models against the model that they were made from: size, speed, memory, and how far their answers are."""
