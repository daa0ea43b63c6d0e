"""POST /v1/responses: https://platform.openai.com/docs/api-reference/responses"""
