"""Every op in plain torch: the oracle of the Triton kernels, and what runs on a CPU."""
