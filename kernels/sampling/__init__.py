"""Drawing tokens: noise that any device computes alike, and the Triton kernels for CUDA."""
