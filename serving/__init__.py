"""Serve a trained model over HTTP with OpenAI's API: `python -m serving MODEL` (docs/serve.md).

guard (id, token, limits, log) -> app (routes) -> inputs (request to Job) -> engine (queue, batches, one
worker thread) -> streaming (tokens to text, row by row) -> formats (answer to response)
"""
