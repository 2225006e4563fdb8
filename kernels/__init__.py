"""The ops of the project and their implementations: torch on CPU, Triton on CUDA.

Importing this package registers both. Triton itself is imported when the first CUDA tensor arrives.
"""

# From the repository's root this folder can also be found as a bare `kernels`, and transformers imports that name to
# look for a library called so. It finds an empty module then: a second registration of the ops would fail.
if __name__ == "sparsespec_compile.kernels":
    import torch

    from . import cuda, halved_product, ops, reference, reference_draw, reference_select

    torch.library.impl("sparsespec::attention_site", ("cpu", "cuda"), reference.attention_site)
    torch.library.impl("sparsespec::halved_product", ("cpu", "cuda"), halved_product.halved_product)
    torch.library.impl("sparsespec::dual_mode_attention", "cpu", reference.dual_mode_attention)
    torch.library.impl("sparsespec::select_pillars", "cpu", reference_select.select_pillars)
    torch.library.impl("sparsespec::draw_tokens", "cpu", reference_draw.draw_tokens)
    torch.library.impl("sparsespec::draw_tokens", "cuda", cuda.draw_tokens)
    torch.library.impl("sparsespec::dual_mode_attention", "cuda", cuda.dual_mode_attention)
    torch.library.impl("sparsespec::select_pillars", "cuda", cuda.select_pillars)

    __all__ = ["ops"]
