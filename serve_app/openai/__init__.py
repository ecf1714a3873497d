"""The OpenAI API: requests, responses, errors, and how text comes out of token ids."""
