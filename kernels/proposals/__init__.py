"""Drafts that are found in a request's own text, on CUDA."""
