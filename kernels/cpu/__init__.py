"""Attention on a CPU: what the reference computes, with torch's fused kernels and one plan for the layers of a step."""
