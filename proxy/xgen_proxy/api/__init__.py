"""The routes: OpenAI's API, /generate, and the endpoints for operators."""
