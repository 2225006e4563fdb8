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
    from .products import halved
    from .reference import attention, proposals, sampling, selection

    LAUNCHERS = {
        "dual_mode_attention": "attention.launcher",
        "select_pillars": "selection.kernel",
        "draw_tokens": "sampling.draw",
        "propose_ngrams": "proposals.ngram",
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

    torch.library.impl("sparsespec::attention_site", ("cpu", "cuda"), attention.attention_site)
    torch.library.impl("sparsespec::halved_product", ("cpu", "cuda"), halved.halved_product)
    torch.library.impl("sparsespec::dual_mode_attention", "cpu", dual_mode_attention)
    torch.library.impl("sparsespec::select_pillars", "cpu", selection.select_pillars)
    torch.library.impl("sparsespec::draw_tokens", "cpu", sampling.draw_tokens)
    torch.library.impl("sparsespec::propose_ngrams", "cpu", proposals.propose_ngrams)
    for _op in LAUNCHERS:
        torch.library.impl(f"sparsespec::{_op}", "cuda", partial(run_on_cuda, _op))

    __all__ = ["ops"]
