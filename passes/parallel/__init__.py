"""Tensor parallelism: which part of a model's weights a rank holds, and how a model becomes that part."""
