"""Requests that pass by their model alone: reranking, scores, classes, tokens, and audio as a form."""
