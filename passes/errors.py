"""Named errors of the compiler. Each message says what was got, what is allowed, and what to do."""

from __future__ import annotations

from sparsespec_compile.kernels.ops import SparseSpecError


class CompileError(SparseSpecError):
    """Base of everything that `compile_model` raises."""


class UnsupportedModelError(CompileError):
    """The model cannot be compiled without changing its text."""


class VersionError(UnsupportedModelError):
    """The installed torch or transformers is outside the range that the compiler was checked with."""


class EncoderDecoderError(UnsupportedModelError):
    """The model is an encoder, or a decoder that attends to an encoder; only decoder-only causal LMs are supported."""


class AttentionInterfaceError(UnsupportedModelError):
    """Some of the model's attention does not go through transformers' `AttentionInterface`."""


class UnsupportedAttentionError(UnsupportedModelError):
    """An attention layer asks for something that the dual-mode op does not apply: biases, masks, ALiBi."""


class MixedPrecisionError(UnsupportedModelError):
    """The model's forward pass is wrapped to run under autocast, so it does not compute in its parameters' dtype."""


class PositionError(UnsupportedModelError):
    """The model's positions cannot be given token by token, which packing needs."""


class RowMixingError(UnsupportedModelError):
    """Something besides the attention sites lets one token see another, so requests cannot be packed."""


class NotANumberError(UnsupportedModelError):
    """The model computes NaN, whatever its tokens."""


class ExportError(UnsupportedModelError):
    """`torch.export` could not trace the model; the cause is chained."""


class ParallelPlanError(UnsupportedModelError):
    """The model's plan for tensor parallelism is missing, unknown here, or does not fit the number of ranks."""


class ShardedModelError(UnsupportedModelError):
    """A model holds one rank's part of its parameters, and more is asked of it."""


class PassMatchError(CompileError):
    """A pass found nothing where it must find something; the message shows the nearest nodes."""


class GraphInvariantError(CompileError):
    """The verifier found a graph that a pass has left broken."""


class StaleParametersError(CompileError):
    """The model is no longer the one that was compiled: a parameter, a setting, a function or a hook has changed."""


class TrainingModeError(CompileError):
    """The model is in training mode and would drop values at random, so that it has no text to reproduce."""


class CostModelError(CompileError):
    """The cost of a model cannot be derived: it uses weights in a way that the cost model does not know."""


class UncompiledStepWarning(UserWarning):
    """A step runs without compiled code, which was not made for its sizes: slower, with the same text."""
