"""The operations a decoder is made of. Each file holds the math once, as a torch function, and what callers use.

Nothing here knows a request, a model or a configuration; only tensors.
"""
