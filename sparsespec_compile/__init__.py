"""Lossless sparse self-speculative decoding for HuggingFace models, as a compiler. See `optimize`."""

from sparsespec_compile.advice import Advice, advise
from sparsespec_compile.api import OptimizedModel, optimize
from sparsespec_compile.ceilings import H200, Ceilings
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import SparseSpecError
from sparsespec_compile.runtime.stats import Stats

__all__ = [
    "H200",
    "Advice",
    "Ceilings",
    "OptimizedModel",
    "SparseSpecError",
    "SpecConfig",
    "Stats",
    "advise",
    "optimize",
]
