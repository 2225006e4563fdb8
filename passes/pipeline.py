"""`compile_model`: a causal LM in, one graph out that drafts, verifies and prefills in the same call."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
import transformers
from torch.fx import GraphModule
from transformers import PreTrainedModel

from .base import COMPILING, GraphPass, PassContext
from .capture.capture import Captured, capture
from .capture.requirements import check_model, check_versions
from .layout import KVLayout
from .proofs.locality import ProveRowLocality
from .proofs.unchanged import ModelRecord
from .proofs.verify import VERIFY_VARIABLE, verify, verify_shapes
from .regions.compile_regions import CompiledForward, OnCompiled, RegionCompiler, compile_regions, inductor
from .regions.split import SplitGraph, split
from .report import AttentionRecord, CompileReport, Dumper, PassRecord
from .rewrites.dual_mode import AttentionToDualMode
from .rewrites.fuse_projections import FuseProjections, give_back_storage
from .rewrites.halve_products import HalveProducts
from .rewrites.normalise import Normalise

PASSES: tuple[type[GraphPass], ...] = (
    Normalise,
    ProveRowLocality,
    AttentionToDualMode,
    FuseProjections,
    HalveProducts,
)
"""The passes, in the order in which they run."""

SPLIT = "split into regions"
"""The last stage, which leaves the graph itself as it is."""


@dataclass(frozen=True)
class CompiledModel:
    """A compiled model.

    Attributes:
        graph_module: called with positional arguments `(input_ids [1, T] int64, position_ids [1, T] int64,
            logits_to_keep [R] int64, kv_pool [pages, elements_per_page] in the model's dtype, scores [C, H, S] f32,
            pillar_index [B, H, M] i32, *STEP_TENSORS)`, gives logits `[1, R, V]`. page_table is [G, B, P], for each
            group of layers; T, R, B, C, pages, S, M and P are free. kv_pool and scores are written in place.
        split: the same computation, cut into regions; equal layers are one of them.
        layout: its attention layers, and how pool, scores and pillars are laid out.
        report: what was done.
        record: what the model was at the end of the compilation, to notice changes that the graph does not follow.
    """

    graph_module: GraphModule
    split: SplitGraph
    layout: KVLayout
    report: CompileReport
    record: ModelRecord

    def compile_regions(
        self, compiler: RegionCompiler = inductor, on_compiled: OnCompiled | None = None
    ) -> CompiledForward:
        """Compiles each distinct region, and puts on record what that took.

        Args:
            compiler: compiles one region.
            on_compiled: called as `on_compiled(done, total)` after each of them, to show progress.

        Returns:
            What is called as `graph_module` is, and never compiles again.
        """
        with COMPILING:
            forward = compile_regions(self.split, compiler, on_compiled)
        notes = tuple(f"{name}: {seconds:.1f} s" for name, seconds in forward.seconds.items())
        self.report.passes.append(
            PassRecord("compile regions", sum(forward.seconds.values()), len(forward.seconds), notes)
        )
        return forward


def compile_model(model: PreTrainedModel, *, page_size: int) -> CompiledModel:
    """Captures `model` and runs the passes; SPARSESPEC_DUMP names a folder for the graph before and after each.

    Args:
        model: a decoder-only causal LM of transformers. Its parameters are shared with the result; projections that
            share an input have theirs moved into the memory of one tensor. Nothing else about the model changes.
        page_size: tokens of a page of the KV pool.

    Raises:
        UnsupportedModelError: a subclass of it names what is not supported; the model is as it was.
    """
    check_versions()
    check_model(model)
    with COMPILING, torch.inference_mode(False):  # parameters made in inference mode could never be changed again
        return _compile(model, page_size, Dumper())


def _compile(model: PreTrainedModel, page_size: int, dumper: Dumper) -> CompiledModel:
    report = CompileReport(
        model=type(model).__name__, versions=f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    started = time.perf_counter()
    captured = capture(model)
    context = _context(model, captured, page_size, report)
    report.passes.append(PassRecord("capture", time.perf_counter() - started, len(captured.sites)))
    try:
        graph_module = _run_passes(context, captured.graph_module, dumper)
        regions = _split(len(PASSES), graph_module, report, dumper)
    except BaseException:
        give_back_storage(context.moved)
        raise
    return CompiledModel(graph_module, regions, context.layout, report, ModelRecord(model))


def _context(model: PreTrainedModel, captured: Captured, page_size: int, report: CompileReport) -> PassContext:
    layout = KVLayout(tuple(site.layer for site in captured.sites), page_size)
    report.attention.extend(AttentionRecord(site.layer, site.module) for site in captured.sites)
    return PassContext(model, layout, report)


def _run_passes(context: PassContext, graph_module: GraphModule, dumper: Dumper) -> GraphModule:
    for number, kind in enumerate(PASSES):
        _run_pass(number, kind(context), graph_module, dumper)
    return GraphModule(graph_module, graph_module.graph)  # holds only the parameters that the graph reads


def _run_pass(number: int, graph_pass: GraphPass, graph_module: GraphModule, dumper: Dumper) -> None:
    dumper.write(number, graph_pass.name, "before", graph_module)
    started = time.perf_counter()
    graph_pass(graph_module)
    verify(graph_module, graph_pass.context.layout)
    if os.environ.get(VERIFY_VARIABLE):
        verify_shapes(graph_module)
    seconds = time.perf_counter() - started
    record = PassRecord(graph_pass.name, seconds, graph_pass.matches, tuple(graph_pass.notes))
    graph_pass.context.report.passes.append(record)
    dumper.write(number, graph_pass.name, "after", graph_module)


def _split(number: int, graph_module: GraphModule, report: CompileReport, dumper: Dumper) -> SplitGraph:
    dumper.write(number, SPLIT, "before", graph_module)
    started = time.perf_counter()
    regions = split(graph_module)
    for name in regions.distinct:  # equal regions have equal shapes, so this verifies the whole graph
        verify_shapes(regions.region(name))
    report.passes.append(PassRecord(SPLIT, time.perf_counter() - started, len(regions.calls), (str(regions),)))
    dumper.write(number, SPLIT, "after", regions.graph_module)
    return regions
