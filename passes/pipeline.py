"""`compile_model`: a causal LM in, one graph out that drafts, verifies and prefills in the same call."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
import transformers
from torch.fx import Graph, GraphModule
from transformers import PreTrainedModel

from .base import COMPILING, GraphPass, Parallel, PassContext, attribute
from .capture.adapters import adapter_layers, settle_adapters
from .capture.capture import Captured, capture
from .capture.quantised import quantisation
from .capture.requirements import check_model, check_versions
from .errors import ExportError, ParallelPlanError
from .layout import KVLayout
from .parallel.division import Part, VocabularySplit, placement_of
from .parallel.shard import shard
from .proofs.locality import ProveRowLocality
from .proofs.sums import verify_sums
from .proofs.unchanged import ModelRecord
from .proofs.verify import VERIFY_VARIABLE, verify, verify_shapes
from .ranks import Ranks, VocabularyPart
from .regions.run import CompiledForward, OnCompiled, RegionCompiler, compile_regions, inductor
from .regions.split import SplitGraph, split
from .report import AttentionRecord, CompileReport, Dumper, PassRecord
from .rewrites.draft_weights import DraftWeights, WeightCopy
from .rewrites.dual_mode import AttentionToDualMode
from .rewrites.experts import ExpertsToKernel
from .rewrites.fuse_projections import FuseProjections, give_back_storage
from .rewrites.halve_products import HalveProducts
from .rewrites.normalise import Normalise
from .rewrites.reduce_sums import ReduceSums
from .rewrites.split_vocabulary import SplitVocabulary

PASSES: tuple[type[GraphPass], ...] = (
    Normalise,
    ProveRowLocality,
    ExpertsToKernel,
    SplitVocabulary,
    ReduceSums,
    AttentionToDualMode,
    FuseProjections,
    HalveProducts,
)
"""The passes, in the order in which they run."""

SPLIT = "split into regions"
"""The last stage, which leaves the graph itself as it is."""

REGIONS, DRAFT_REGIONS = "compile regions", "compile regions of drafts"
"""Their compilation, in the report."""


@dataclass(frozen=True)
class DraftForm:
    """The form of a compiled graph that reads 8-bit copies of the weights; see `rewrites.draft_weights`.

    Attributes:
        graph_module: called as `CompiledModel.graph_module` is, once the copies have memory.
        split: the same computation, cut into regions.
        copies: what it reads, one for each weight.
    """

    graph_module: GraphModule
    split: SplitGraph
    copies: tuple[WeightCopy, ...]


@dataclass(frozen=True)
class CompiledModel:
    """A compiled model.

    Attributes:
        graph_module: called with positional arguments `(input_ids [1, T] int64, position_ids [1, T] int64,
            logits_to_keep [R] int64, kv_pool [pages, elements_per_page] in the model's dtype, scores [C, H, S] f32,
            pillar_index [B, H, M] i32, *STEP_TENSORS)`, gives logits `[1, R, V]`. page_table is [G, B, P], for each
            group of layers; T, R, B, C, pages, S, M and P are free. kv_pool and scores are written in place. V is the
            vocabulary, or `vocabulary.length` where ranks share it.
        split: the same computation, cut into regions; equal layers are one of them.
        layout: its attention layers, and how pool, scores and pillars are laid out.
        report: what was done.
        record: what the model was at the end of the compilation, to notice changes that the graph does not follow.
        ranks: the ranks that share the model, each with a graph of its own; None when it is whole.
        draft: what drafts run in its place; None = the same.
        vocabulary: the tokens of which the graph gives logits; None = all.
    """

    graph_module: GraphModule
    split: SplitGraph
    layout: KVLayout
    report: CompileReport
    record: ModelRecord
    ranks: Ranks | None = None
    draft: DraftForm | None = None
    vocabulary: VocabularyPart | None = None

    def compile_regions(
        self, compiler: RegionCompiler = inductor, on_compiled: OnCompiled | None = None
    ) -> CompiledForward:
        """Compiles each distinct region, those of `draft` too, and puts on record what that took.

        Args:
            compiler: compiles one region.
            on_compiled: called as `on_compiled(done, total)` after each of them, to show progress.

        Returns:
            What is called as `graph_module` is, and never compiles again; the same of `draft` as its `drafts`.
        """
        splits = [self.split] if self.draft is None else [self.split, self.draft.split]
        with COMPILING:
            forward, *drafts = forwards = compile_regions(splits, compiler, on_compiled)
        for stage, compiled in zip((REGIONS, DRAFT_REGIONS), forwards, strict=False):
            notes = tuple(f"{name}: {seconds:.1f} s" for name, seconds in compiled.seconds.items())
            self.report.passes.append(PassRecord(stage, sum(compiled.seconds.values()), len(notes), notes))
        forward.drafts = drafts[0] if drafts else None
        return forward


def compile_model(
    model: PreTrainedModel, *, page_size: int, ranks: Ranks | None = None, draft_dtype: torch.dtype | None = None
) -> CompiledModel:
    """Captures `model` and runs the passes; SPARSESPEC_DUMP names a folder for the graph before and after each.

    Args:
        model: a decoder-only causal LM of transformers. Its parameters are shared with the result; projections that
            share an input have theirs moved into the memory of one tensor. Nothing else about the model changes.
        page_size: tokens of a page of the KV pool.
        ranks: the ranks that share the model, of which each calls this. A whole model becomes this rank's part, in
            place (`parallel/shard.py`).
        draft_dtype: of the copies of weights that drafts read, int8 or float8_e4m3fn; None = drafts read the weights.

    Raises:
        UnsupportedModelError: a subclass of it names what is not supported; the model is as it was, but that it may
            have become a rank's part.
    """
    check_versions()
    check_model(model)
    if ranks is not None:
        _check_divisible(model)
    settle_adapters(model)
    with COMPILING, torch.inference_mode(False):  # parameters made in inference mode could never be changed again
        part = None if ranks is None else shard(model, ranks)
        return _compile(model, page_size, part, draft_dtype, Dumper())


def _check_divisible(model: PreTrainedModel) -> None:
    quantised, adapted = quantisation(model), next(iter(adapter_layers(model)), None)
    if quantised is not None:
        raise ParallelPlanError(
            f"{type(model).__name__} has quantised weights ({quantised}), whose parts no plan divides among ranks. "
            "Allowed: plain floating-point weights. Load the model without quantisation, or run it on one GPU."
        )
    if adapted is not None:
        raise ParallelPlanError(
            f"{adapted} has adapters, which no plan divides among ranks. Allowed: models without. Merge them for good "
            "with merge_and_unload(), or run the model on one GPU."
        )


def _compile(
    model: PreTrainedModel, page_size: int, part: Part | None, draft_dtype: torch.dtype | None, dumper: Dumper
) -> CompiledModel:
    report = CompileReport(
        model=type(model).__name__, versions=f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    started = time.perf_counter()
    captured = capture(model) if part is None else _capture_part(model, part)
    context = _context(model, captured, page_size, report, None if part is None else _parallel(model, part, captured))
    report.passes.append(PassRecord("capture", time.perf_counter() - started, len(captured.sites), captured.notes))
    try:
        graph_module = _run_passes(context, captured.graph_module, dumper)
        regions = _split(len(PASSES), graph_module, report, dumper)
        draft = None if draft_dtype is None else _draft_form(DraftWeights(context, draft_dtype), graph_module, dumper)
    except BaseException:
        give_back_storage(context.moved)
        raise
    ranks, vocabulary = (None, None) if part is None else (part.ranks, _logits_of(model, part))
    record = ModelRecord(model)
    return CompiledModel(graph_module, regions, context.layout, report, record, ranks, draft, vocabulary)


def _capture_part(model: PreTrainedModel, part: Part) -> Captured:
    try:
        return capture(model)
    except ExportError as error:
        raise ParallelPlanError(
            f"Divided among {part.ranks.size} ranks as its plan says, {type(model).__name__} does not run: {error} "
            "Allowed besides: plans under which a rank's heads and columns fit each other. Change model.tp_plan, or "
            "run the model on one GPU."
        ) from error


def _parallel(model: PreTrainedModel, part: Part, captured: Captured) -> Parallel:
    """Which part of each parameter of the graph a rank has. The graph may know a tied one by another name."""
    held = dict(model.named_parameters(remove_duplicate=False))
    divided = {id(held[path]): (division, held[path].shape) for path, division in part.divisions.items()}
    read = {str(node.target) for node in captured.graph_module.graph.find_nodes(op="get_attr")}
    found = {target: divided.get(id(attribute(captured.graph_module, target))) for target in read}
    known = {target: one for target, one in found.items() if one is not None}
    places = {target: placement_of(division, shape) for target, (division, shape) in known.items()}
    vocabularies = {
        target: division.part(part.ranks)
        for target, (division, _) in known.items()
        if isinstance(division, VocabularySplit)
    }
    return Parallel(part, places, vocabularies)


def _logits_of(model: PreTrainedModel, part: Part) -> VocabularyPart | None:
    """The tokens of which a rank's graph gives logits; None = all."""
    output = model.get_output_embeddings()
    weights = {id(parameter) for parameter in (() if output is None else output.parameters())}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        division = part.divisions.get(path)
        if id(parameter) in weights and isinstance(division, VocabularySplit):
            return division.part(part.ranks)
    return None


def _context(
    model: PreTrainedModel, captured: Captured, page_size: int, report: CompileReport, parallel: Parallel | None = None
) -> PassContext:
    layout = KVLayout(tuple(site.layer for site in captured.sites), page_size)
    report.attention.extend(AttentionRecord(site.layer, site.module) for site in captured.sites)
    return PassContext(model, layout, report, parallel)


def _run_passes(context: PassContext, graph_module: GraphModule, dumper: Dumper) -> GraphModule:
    for number, kind in enumerate(PASSES):
        _run_pass(number, kind(context), graph_module, dumper)
    return GraphModule(graph_module, graph_module.graph)  # holds only the parameters that the graph reads


def _draft_form(draft_weights: DraftWeights, graph_module: GraphModule, dumper: Dumper) -> DraftForm | None:
    """The second form of the final graph, which stays as it is; None where no product can read a copy."""
    graph = Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    draft = GraphModule(graph_module, graph)
    _run_pass(len(PASSES) + 1, draft_weights, draft, dumper)
    if not draft_weights.matches:
        return None
    draft = GraphModule(draft, graph)
    split = _split(len(PASSES) + 2, draft, draft_weights.context.report, dumper)
    return DraftForm(draft, split, tuple(draft_weights.copies))


def _run_pass(number: int, graph_pass: GraphPass, graph_module: GraphModule, dumper: Dumper) -> None:
    dumper.write(number, graph_pass.name, "before", graph_module)
    started = time.perf_counter()
    graph_pass(graph_module)
    verify(graph_module, graph_pass.context.layout, drafts=isinstance(graph_pass, DraftWeights))
    parallel = graph_pass.context.parallel
    if parallel is not None and parallel.reduced:
        verify_sums(graph_module, parallel.weights)
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
