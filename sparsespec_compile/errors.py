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
    PassMatchError,
    PositionError,
    RowMixingError,
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
    """A workload or an acceptance that no advice can be given for."""


class PromptError(SparseSpecError, ValueError):
    """A prompt is empty, has the wrong type or device, or holds tokens outside the vocabulary."""


class SamplingError(SparseSpecError, ValueError):
    """A sampling argument is unknown, out of range or not supported."""


class PoolTooSmallError(SparseSpecError, ValueError):
    """Memory for the keys and values of a request, or for the state of requests, cannot be had."""


class MemoryPlanError(PoolTooSmallError):
    """What a model's state and steps need does not fit the device's free memory."""


class ContextLengthError(SparseSpecError, ValueError):
    """Prompt and new tokens together exceed the positions that the model can compute."""


class ContextLengthWarning(UserWarning):
    """Prompt and new tokens together may exceed the positions that a rotary model is made for."""


class CopyError(SparseSpecError, TypeError):
    """A compiled model was copied or pickled."""


class EngineBusyError(SparseSpecError, RuntimeError):
    """A generation was added to after its end, used from within itself, or is in the way of `release`."""


class EngineFailedError(SparseSpecError, RuntimeError):
    """An iteration that a generation shared with another caller's failed there, and its texts were dropped."""


class EngineStalledError(SparseSpecError, RuntimeError):
    """Requests were run for many iterations without any of them coming forward."""


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
    "MixedPrecisionError",
    "NotANumberError",
    "PassMatchError",
    "PoolTooSmallError",
    "PositionError",
    "PromptError",
    "RequestFailedError",
    "RowMixingError",
    "SamplingError",
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
