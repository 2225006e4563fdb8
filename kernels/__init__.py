"""The ops of the project and their implementations: torch on CPU, Triton on CUDA.

Importing this package registers both. Triton itself is imported when the first CUDA tensor arrives, so the package
imports on a machine without Triton; there, a CUDA tensor raises KernelUnavailableError.
"""

# From the repository's root this folder can also be found as a bare `kernels`, and transformers imports that name to
# look for a library called so. It finds an empty module then: a second registration of the ops would fail.
if __name__ == "sparsespec_compile.kernels":
    from functools import partial
    from importlib import import_module
    from typing import Any

    import torch

    from . import ops
    from .cpu.attention import dual_mode_attention
    from .errors import KernelUnavailableError
    from .products import collectives, library
    from .reference.attention import attention_site
    from .reference.drafting import propose_ngrams, select_pillars
    from .reference.products import experts, experts_site, fp8_product, quantise_rows, quantised_product
    from .reference.sampling import draw_part, draw_tokens
    from .sampling import processing

    LAUNCHERS = {
        "dual_mode_attention": "attention.launcher",
        "select_pillars": "drafting.pillars",
        "draw_tokens": "sampling.draw",
        "draw_part": "sampling.draw",
        "propose_ngrams": "drafting.ngrams",
        "experts": "products.experts",
        "quantised_product": "products.quantised",
        "quantise_rows": "products.quantised",
    }
    """The modules that run ops on CUDA tensors; each has a function of the op's name."""

    def run_on_cuda(op: str, *arguments: Any) -> Any:
        """Call the Triton launcher of an op.

        Raises:
            KernelUnavailableError: Triton is not installed.
        """
        try:
            module = import_module(f".{LAUNCHERS[op]}", __package__)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise KernelUnavailableError(
                "the tensors are on CUDA, whose kernels need Triton, and Triton is not installed: "
                "install it with `pip install triton`, or move model and tensors to the CPU"
            ) from error
        return getattr(module, op)(*arguments)

    torch.library.impl("sparsespec::attention_site", ("cpu", "cuda"), attention_site)
    torch.library.impl("sparsespec::experts_site", ("cpu", "cuda"), experts_site)
    torch.library.impl("sparsespec::experts", "cpu", experts)
    torch.library.impl("sparsespec::halved_product", ("cpu", "cuda"), library.halved_product)
    torch.library.impl("sparsespec::fp8_product", "cuda", library.fp8_product)
    torch.library.impl("sparsespec::fp8_product", "cpu", fp8_product)
    torch.library.impl("sparsespec::all_reduce", ("cpu", "cuda"), collectives.all_reduce)
    torch.library.impl("sparsespec::all_gather", ("cpu", "cuda"), collectives.all_gather)
    torch.library.impl("sparsespec::embed_part", ("cpu", "cuda"), collectives.embed_part)
    torch.library.impl("sparsespec::process_logits", "cpu", processing.process_logits_on_cpu)
    torch.library.impl("sparsespec::process_logits", "cuda", processing.process_logits)
    torch.library.impl("sparsespec::dual_mode_attention", "cpu", dual_mode_attention)
    torch.library.impl("sparsespec::select_pillars", "cpu", select_pillars)
    torch.library.impl("sparsespec::draw_tokens", "cpu", draw_tokens)
    torch.library.impl("sparsespec::draw_part", "cpu", draw_part)
    torch.library.impl("sparsespec::propose_ngrams", "cpu", propose_ngrams)
    torch.library.impl("sparsespec::quantised_product", "cpu", quantised_product)
    torch.library.impl("sparsespec::quantise_rows", "cpu", quantise_rows)
    for _op in LAUNCHERS:
        torch.library.impl(f"sparsespec::{_op}", "cuda", partial(run_on_cuda, _op))

    __all__ = ["ops"]
