"""From a model and settings to what the engine runs: the graph, and its form on 8-bit copies for drafts."""

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from sparsespec_compile.advice.ceilings import ceilings_of
from sparsespec_compile.advice.prediction import draft_cost, iteration_time
from sparsespec_compile.compile.ranks import ranks_of
from sparsespec_compile.compile.warm_up import kernels_compiled_beside
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import CeilingsError, ConfigError, CostModelError, UnsupportedModelError
from sparsespec_compile.kernels.launch import FP8_CAPABILITY, device_limits
from sparsespec_compile.kernels.ops import QUANTISED_DTYPES
from sparsespec_compile.passes.base import COMPILING
from sparsespec_compile.passes.capture.quantised import plain_tensors, quantisation
from sparsespec_compile.passes.capture.rotary import positions_of
from sparsespec_compile.passes.compat import triton_cache_dir
from sparsespec_compile.passes.cost.graph import graph_cost
from sparsespec_compile.passes.pipeline import CompiledModel, DraftForm, compile_model
from sparsespec_compile.passes.regions.run import run_directly
from sparsespec_compile.passes.report import CompileReport
from sparsespec_compile.runtime.build import Target, most_rows
from sparsespec_compile.runtime.device.drafters import cycles_of
from sparsespec_compile.runtime.device.graphs import padded, row_counts
from sparsespec_compile.runtime.device.inputs import MIN_ROWS
from sparsespec_compile.runtime.device.step import Forward, as_it_is, without_autocast
from sparsespec_compile.runtime.device.weights import DraftCopies, DraftGraph
from sparsespec_compile.runtime.host.iteration_times import IterationTime


def compile_target(model: PreTrainedModel, config: SpecConfig) -> tuple[CompiledModel, Target]:
    """Compile `model` and choose how its graph and the functions around it run.

    Raises:
        UnsupportedModelError: the model, or the device it is on, is not supported.
    """
    device = model.device
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(f"The model is on {device}; kernels exist for CPU and CUDA. Move it there.")
    with COMPILING, without_autocast(device), torch.random.fork_rng([device] if device.type == "cuda" else []):
        return _compile(model, config)


def _compile(model: PreTrainedModel, config: SpecConfig) -> tuple[CompiledModel, Target]:
    device = model.device
    ranks = ranks_of(model, config)
    kind, reason = draft_kind(config, device, quantisation(model))
    dtype = None if kind is None else QUANTISED_DTYPES[kind]
    compiled = compile_model(model, page_size=config.page_size, ranks=ranks, draft_dtype=dtype)
    compiled.report.draft_weights = reason
    inductor = config.backend == "inductor" or (config.backend == "auto" and device.type == "cuda")
    if inductor:
        _settle_kernel_cache(device)
    with kernels_compiled_beside(compiled, config, device):
        forward, drafts = _compile_regions(compiled) if inductor else _run_directly(compiled)
    predicted, predicted_with_copies = _predicted(compiled, config, device, kind)
    return compiled, Target(
        forward=forward,
        layout=compiled.layout,
        ranks=compiled.ranks,
        vocabulary=compiled.vocabulary,
        dtype=model.dtype,
        device=device,
        compiler=partial(torch.compile, dynamic=True) if inductor else as_it_is,
        iteration_time=predicted,
        positions=positions_of(model),
        weight_bytes=sum(weight.numel() * weight.itemsize for weight in plain_tensors(model.parameters())),
        weights=plain_tensors((*model.parameters(), *model.buffers())),
        # Compiled code holds for two rows at least; run node by node, the graph takes what it was proved to take.
        fewest_rows=1 if compiled.report.takes_single_rows and not inductor else MIN_ROWS,
        drafts=(
            draft_graph(compiled.draft, drafts, kind, config, compiled.report, predicted_with_copies)
            if compiled.draft is not None and drafts is not None and kind is not None
            else None
        ),
    )


def _predicted(
    compiled: CompiledModel, config: SpecConfig, device: torch.device, kind: str | None
) -> tuple[IterationTime | None, IterationTime | None]:
    """What "auto" predicts iterations to take, without and with 8-bit draft weights; None where measured times tell.

    That is on CPUs, on devices whose ceilings could not be measured, and for models whose cost the graph does not tell.
    """
    if config.draft_tokens != "auto" or (device.type == "cpu" and config.ceilings is None):
        return None, None
    try:
        cost = graph_cost(compiled.graph_module)
        drafts = None
        if compiled.draft is not None and kind is not None:
            drafts = draft_cost(graph_cost(compiled.draft.graph_module), kind)
        ceilings = ceilings_of(device if config.ceilings is None else config.ceilings)
    except (CostModelError, CeilingsError):
        return None, None
    computed = None
    if device.type == "cuda" and config.cuda_graphs:
        computed = partial(padded, sizes=row_counts(most_rows(config, config.max_requests)))
    return (
        iteration_time(cost, config.schedule, ceilings, padded=computed),
        iteration_time(cost, config.schedule, ceilings, drafts, computed),
    )


def _settle_kernel_cache(device: torch.device) -> None:
    """Point Triton at the folder that Inductor points it at once it has a kernel of its own.

    Done before kernels are compiled beside it, so that they are always looked for in the same place.
    """
    if device.type == "cuda":
        os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device))


def _run_directly(compiled: CompiledModel) -> tuple[Forward, Forward | None]:
    """The graph, and its form for drafts."""
    drafts = compiled.draft
    return run_directly(compiled.graph_module), None if drafts is None else run_directly(drafts.graph_module)


def _compile_regions(compiled: CompiledModel) -> tuple[Forward, Forward | None]:
    """The graph, and its form for drafts."""
    with tqdm(desc="compiling", unit=" regions", leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        forward = compiled.compile_regions(on_compiled=show)
    return forward, forward.drafts


def draft_kind(config: SpecConfig, device: torch.device, quantised: str | None = None) -> tuple[str | None, str]:
    """The kind of the copies, a key of `kernels.ops.QUANTISED_DTYPES`, or None; and in a line why there are none.

    Args:
        quantised: how the model's own weights are quantised; None = they are not.

    Raises:
        ConfigError: the device has no such numbers.
    """
    asked = config.draft_weights
    capability = device_limits(device).capability if device.type == "cuda" else 0
    if asked == "fp8" and capability < FP8_CAPABILITY:
        have = f"{device}, of compute capability {capability / 10}" if capability else str(device)
        raise ConfigError(
            f"draft_weights='fp8' needs a CUDA device of compute capability {FP8_CAPABILITY / 10} or later, got "
            f"{have}. Choose 'int8', 'exact' or 'auto'."
        )
    if not any(cycle.passes for cycle in cycles_of(config)):
        return None, "exact weights, as no iteration drafts with the model"
    if asked == "auto" and quantised is not None:
        return None, f"exact weights, as the model's own are quantised already ({quantised})"
    if asked == "auto" and device.type == "cpu":
        return None, "exact weights, as 8 bits save no time on a CPU"
    if asked == "exact":
        return None, "exact weights"
    # Without matrix instructions for fp8 only the weights can be narrow, and int8 ones are nearer to the truth.
    best = "fp8" if capability >= FP8_CAPABILITY else "int8"
    return best if asked == "auto" else asked, "exact weights, as no product of the model can read 8-bit copies"


def draft_graph(
    draft: DraftForm,
    forward: Callable[..., Tensor],
    kind: str,
    config: SpecConfig,
    report: CompileReport,
    predicted: IterationTime | None,
) -> DraftGraph:
    """What the engine runs for drafts: `forward` on copies that have no memory yet."""
    settled = partial(setattr, report, "draft_weights")
    return DraftGraph(forward, DraftCopies(draft.copies, kind), config.draft_weights != "auto", settled, predicted)
