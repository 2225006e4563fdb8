"""The dual-mode attention on CUDA, in Triton. ``launcher`` is the way in."""
