"""What each engine does differently from OpenAI's API, and how the proxy evens it out."""
