"""Lossless sparse self-speculative decoding for HuggingFace models, as a compiler. See `optimize`."""

from pathlib import Path

__version__ = "0.1.0"

if not (Path(__file__).parent / "kernels").exists():
    # Python started in the repository imports this folder, not the installed package; two subpackages are beside it.
    __path__.append(str(Path(__file__).parents[1]))

from sparsespec_compile.advice.advise import Advice, advise
from sparsespec_compile.advice.ceilings import H200, Ceilings
from sparsespec_compile.api import OptimizedModel, optimize
from sparsespec_compile.compile.ranks import load_shards
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import SparseSpecError
from sparsespec_compile.integrations.transformers import install, uninstall
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.plotting import plot
from sparsespec_compile.requests.sampling_params import Completion, SamplingParams
from sparsespec_compile.runtime.device.captured_step import CapturedStep
from sparsespec_compile.runtime.device.inputs import PageUpdate, Work
from sparsespec_compile.runtime.device.sampling import DrawParams
from sparsespec_compile.runtime.host.request import FinishReason
from sparsespec_compile.runtime.host.stats import Stats
from sparsespec_compile.stream import Tokens, TokenStream
from sparsespec_compile.trial.audit import AuditReport, audit
from sparsespec_compile.trial.bench import BenchReport, bench

__all__ = [
    "H200",
    "Advice",
    "AuditReport",
    "BenchReport",
    "CapturedStep",
    "Ceilings",
    "Completion",
    "DrawParams",
    "FinishReason",
    "Mode",
    "OptimizedModel",
    "PageUpdate",
    "SamplingParams",
    "SparseSpecError",
    "SpecConfig",
    "Stats",
    "TokenStream",
    "Tokens",
    "Work",
    "advise",
    "audit",
    "bench",
    "install",
    "load_shards",
    "optimize",
    "plot",
    "uninstall",
]
