"""From logits to tokens: penalties and biases on any device, and the Triton kernels that draw on CUDA."""
