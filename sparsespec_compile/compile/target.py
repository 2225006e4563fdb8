"""From a model and settings to what the engine runs."""

import os
from functools import partial

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from sparsespec_compile.advice.calibration import ceilings_of
from sparsespec_compile.advice.prediction import iteration_time
from sparsespec_compile.compile.warm_up import kernels_compiled_beside
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import CeilingsError, CostModelError, UnsupportedModelError
from sparsespec_compile.passes.base import COMPILING
from sparsespec_compile.passes.compat import triton_cache_dir
from sparsespec_compile.passes.cost.graph import graph_cost
from sparsespec_compile.passes.pipeline import CompiledModel, compile_model
from sparsespec_compile.passes.regions.compile_regions import CompiledForward
from sparsespec_compile.passes.regions.run_directly import run_directly
from sparsespec_compile.runtime.build import Target
from sparsespec_compile.runtime.device.inputs import MIN_ROWS
from sparsespec_compile.runtime.device.step import as_it_is, without_autocast
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
    compiled = compile_model(model, page_size=config.page_size)
    inductor = config.backend == "inductor" or (config.backend == "auto" and device.type == "cuda")
    if inductor:
        _settle_kernel_cache(device)
    with kernels_compiled_beside(compiled, config, device):
        forward = _compile_regions(compiled) if inductor else run_directly(compiled.graph_module)
    return compiled, Target(
        forward=forward,
        layout=compiled.layout,
        dtype=model.dtype,
        device=device,
        compiler=partial(torch.compile, dynamic=True) if inductor else as_it_is,
        iteration_time=_predicted(compiled, config, device),
        positions=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        weight_bytes=sum(parameter.numel() * parameter.itemsize for parameter in model.parameters()),
        # Compiled code holds for two rows at least; run node by node, the graph takes what it was proved to take.
        fewest_rows=1 if compiled.report.takes_single_rows and not inductor else MIN_ROWS,
    )


def _predicted(compiled: CompiledModel, config: SpecConfig, device: torch.device) -> IterationTime | None:
    """What "auto" predicts iterations to take; None where measured times alone tell.

    That is on CPUs, on devices whose ceilings could not be measured, and for models whose cost no shape tells.
    """
    if config.draft_tokens != "auto" or (device.type == "cpu" and config.ceilings is None):
        return None
    try:
        cost = graph_cost(compiled.graph_module)
        ceilings = ceilings_of(device if config.ceilings is None else config.ceilings)
    except (CostModelError, CeilingsError):
        return None
    return iteration_time(cost, config.schedule, ceilings)


def _settle_kernel_cache(device: torch.device) -> None:
    """Point Triton at the folder that Inductor points it at once it has a kernel of its own.

    Done before kernels are compiled beside it, so that they are always looked for in the same place.
    """
    if device.type == "cuda":
        os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device))


def _compile_regions(compiled: CompiledModel) -> CompiledForward:
    with tqdm(desc="compiling", unit=" regions", leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return compiled.compile_regions(on_compiled=show)
