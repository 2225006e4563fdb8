"""The ops of the project and their implementations: torch on CPU, Triton on CUDA.

Importing this package registers both. Triton itself is imported when the first CUDA tensor arrives.
"""

import torch

from . import ops, reference, reference_select

torch.library.impl("sparsespec::attention_site", ("cpu", "cuda"), reference.attention_site)
torch.library.impl("sparsespec::dual_mode_attention", "cpu", reference.dual_mode_attention)
torch.library.impl("sparsespec::select_pillars", "cpu", reference_select.select_pillars)

__all__ = ["ops"]
