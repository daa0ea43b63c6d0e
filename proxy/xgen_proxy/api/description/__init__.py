"""The API described, as /openapi.json and /docs, from what the code checks and raises."""
