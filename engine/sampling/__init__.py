"""Logits → tokens and log-probabilities, each request by its own parameters."""
