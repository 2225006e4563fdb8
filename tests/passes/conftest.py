"""Models and their compilations, made once for the whole session."""

from functools import cache, cached_property

import pytest
import torch

import sparsespec_compile.kernels  # noqa: F401  registers the ops
from sparsespec_compile.passes.capture.capture import capture
from sparsespec_compile.passes.pipeline import compile_model
from sparsespec_compile.passes.proofs.verify import VERIFY_VARIABLE

from .families import logits, tiny, tokens

PAGE_SIZE = 16


class Bench:
    """One family: its model, HuggingFace's logits for two sequences, the captured graph, the compiled one."""

    def __init__(self, family):
        self.family = family
        self.model = tiny(family)
        self.sequences = [tokens(11, seed=1), tokens(37, seed=2)]
        self.expected = [logits(self.model, sequence) for sequence in self.sequences]

    @cached_property
    def captured(self):
        return capture(self.model)

    @cached_property
    def compiled(self):
        """With all shapes verified after every pass, which takes as long again; other tests leave it to the last."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VERIFY_VARIABLE, "1")
            return compile_model(self.model, page_size=PAGE_SIZE)

    def close(self, got, expected):
        """Whether logits agree up to the rounding of float32 sums in another order."""
        return torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@cache
def _bench(family):
    return Bench(family)


@pytest.fixture(scope="session")
def bench():
    """A function from a family's name to its `Bench`."""
    return _bench
