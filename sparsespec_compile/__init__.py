"""Lossless sparse self-speculative decoding for HuggingFace models, as a compiler."""
