"""Every named error and warning of the project, in one place. All errors derive from `SparseSpecError`."""

from sparsespec_compile.kernels.errors import (
    KernelInputError,
    KernelUnavailableError,
    SparseSpecError,
    TuningCacheWarning,
)
from sparsespec_compile.passes.errors import (
    AttentionInterfaceError,
    CompileError,
    CostModelError,
    EncoderDecoderError,
    ExportError,
    GraphInvariantError,
    MixedPrecisionError,
    NotANumberError,
    ParallelPlanError,
    PassMatchError,
    PositionError,
    RowMixingError,
    ShardedModelError,
    StaleParametersError,
    TrainingModeError,
    UncompiledStepWarning,
    UnsupportedAttentionError,
    UnsupportedModelError,
    VersionError,
)


class ConfigError(SparseSpecError, ValueError):
    """A setting is unknown or has a value that is not allowed, or work does not fit a captured step."""


class CeilingsError(SparseSpecError, ValueError):
    """A device's ceilings are unknown or impossible."""


class CeilingsCacheWarning(UserWarning):
    """Measured ceilings of a device cannot be read from, or kept in, the user's cache folder."""


class AdviceError(SparseSpecError, ValueError):
    """A workload or an acceptance is impossible."""


class MissingPackageError(SparseSpecError, ImportError):
    """A function needs a package that only an extra installs."""


class PlotError(SparseSpecError, ValueError):
    """There is nothing to draw: something else than stats, or stats of no iteration."""


class CommandError(SparseSpecError, ValueError):
    """An argument of `python -m sparsespec_compile` cannot be used, such as a folder without a model."""


class PromptError(SparseSpecError, ValueError):
    """A prompt is empty, has the wrong type or device, or holds tokens outside the vocabulary."""


class SamplingError(SparseSpecError, ValueError):
    """A sampling argument is unknown, out of range or not supported."""


class TokenizerError(SparseSpecError, ValueError):
    """A text is asked for without a tokenizer."""


class PoolTooSmallError(SparseSpecError, ValueError):
    """There is no memory for the keys and values of a request, or for the state of requests."""


class MemoryPlanError(PoolTooSmallError):
    """What a model's state and steps need does not fit the device's free memory."""


class ContextLengthError(SparseSpecError, ValueError):
    """Prompt and new tokens together exceed the positions that the model can compute."""


class ContextLengthWarning(UserWarning):
    """Prompt and new tokens together may exceed the positions that a rotary model is made for."""


class CopyError(SparseSpecError, TypeError):
    """A compiled model was copied or pickled."""


class EngineBusyError(SparseSpecError, RuntimeError):
    """A request was added to a stream that has ended, a generation was used from within itself, or blocks `release`."""


class EngineFailedError(SparseSpecError, RuntimeError):
    """An iteration that this generation shared with another caller failed, and its texts were dropped."""


class EngineStalledError(SparseSpecError, RuntimeError):
    """Many iterations ran without progress of any request."""


class RanksDifferError(SparseSpecError, RuntimeError):
    """Ranks that share a model were given other requests, or have planned other iterations, than each other."""


class RanksEndedError(SparseSpecError, RuntimeError):
    """A rank that shares the model ended, failed or stayed away, and the others cannot go on without it."""


class GraphMemoryWarning(UserWarning):
    """There is no memory to capture a step, and a larger one that was captured runs in its place."""


class RequestFailedError(SparseSpecError, RuntimeError):
    """Whole texts were asked for, and one ended with `FinishReason.ERROR`."""


class StoppedError(SparseSpecError, RuntimeError):
    """Whole texts were asked for, and `OptimizedModel.stop` ended them before."""


__all__ = [
    "AdviceError",
    "AttentionInterfaceError",
    "CeilingsCacheWarning",
    "CeilingsError",
    "CommandError",
    "CompileError",
    "ConfigError",
    "ContextLengthError",
    "ContextLengthWarning",
    "CopyError",
    "CostModelError",
    "EncoderDecoderError",
    "EngineBusyError",
    "EngineFailedError",
    "EngineStalledError",
    "ExportError",
    "GraphInvariantError",
    "GraphMemoryWarning",
    "KernelInputError",
    "KernelUnavailableError",
    "MemoryPlanError",
    "MissingPackageError",
    "MixedPrecisionError",
    "NotANumberError",
    "ParallelPlanError",
    "PassMatchError",
    "PlotError",
    "PoolTooSmallError",
    "PositionError",
    "PromptError",
    "RanksDifferError",
    "RanksEndedError",
    "RequestFailedError",
    "RowMixingError",
    "SamplingError",
    "ShardedModelError",
    "SparseSpecError",
    "StaleParametersError",
    "StoppedError",
    "TrainingModeError",
    "TuningCacheWarning",
    "UncompiledStepWarning",
    "UnsupportedAttentionError",
    "UnsupportedModelError",
    "VersionError",
]
