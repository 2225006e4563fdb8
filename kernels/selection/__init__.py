"""The selection of the pillars on CUDA, in Triton."""
