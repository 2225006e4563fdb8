"""Compiles the Triton kernels of a model's steps in threads, beside what else `optimize` does.

Triton compiles a kernel in its first launch, and once more for each pattern of dtypes, strides and alignments. For the
attention kernel that takes about ten seconds, nearly all of them outside of Python's lock. So each op is called here as
the model's steps will call it, on tensors laid out as the graph's own and without any work to do. Nothing is assumed
about layouts: they are read from the compiled graph.

What a generation decides is not known yet: for more slots than 64 attention and the selection of pillars depend on
their number, which is taken for the largest. The selection also depends on whether rows of scores begin at multiples of
16 bytes, as the engine's do. A pool that holds 2**31 keys or more takes wider offsets, but the first step runs before
there is one. What differs from this is compiled when it is met.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.kernels.launch import Promise, kind_of_step, promised
from sparsespec_compile.kernels.ops import (
    QUANTISED_DTYPES,
    STEP_TENSORS,
    AttentionCall,
    AttentionSettings,
    ExpertsCall,
    ExpertsSettings,
    StepTensors,
    draw_tokens,
    dual_mode_attention,
    experts,
    propose_ngrams,
    quantise_rows,
    quantised_product,
    select_pillars,
)
from sparsespec_compile.passes.base import attribute, call_of, find_calls, input_node
from sparsespec_compile.passes.layout import AttentionLayer, KVLayout
from sparsespec_compile.passes.pipeline import CompiledModel, DraftForm
from sparsespec_compile.runtime.build import most_rows
from sparsespec_compile.runtime.device.drafters import NgramDrafter, drafters_of
from sparsespec_compile.runtime.device.graphs import row_counts
from sparsespec_compile.runtime.device.weights import MOST_ROWS

_ALIGNMENT = 16
"""Kernels differ by whether addresses and strides are multiples of 16."""

_FEW_ROWS = 16
"""Rows of a small step. Where a stride depends on them, it is as divisible as in most captured steps."""

_PAGES = 2
"""Pages of the placeholder pool."""


class Layout(NamedTuple):
    """A tensor to be made: sizes, and strides and offset in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def make(self, device: torch.device) -> Tensor:
        """The tensor, all 0."""
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return torch.zeros(last + 1, dtype=self.dtype, device=device).as_strided(self.size, self.stride, self.offset)


class Attention(NamedTuple):
    """A call of `dual_mode_attention` without work; the settings stand for all that take the same kernel."""

    q: Layout
    k: Layout
    v: Layout
    kv: Layout
    requests: int
    promise: Promise
    settings: AttentionSettings
    sinks: torch.dtype | None

    def run(self, device: torch.device) -> None:
        """Make the tensors and call the op."""
        q, k, v, kv = (layout.make(device) for layout in (self.q, self.k, self.v, self.kv))
        heads = self.k.size[1]
        idle = torch.zeros(self.requests, dtype=torch.int32, device=device)
        step = StepTensors(**dict.fromkeys(STEP_TENSORS, idle))._replace(page_table=idle[:, None])
        scores = torch.zeros(1, heads, 1, dtype=torch.float32, device=device)
        pillars = torch.zeros(self.requests, heads, 1, dtype=torch.int32, device=device)
        sinks = None if self.sinks is None else torch.zeros(q.shape[1], dtype=self.sinks, device=device)
        with promised(self.promise):
            dual_mode_attention(*AttentionCall(q, k, v, kv, scores, step, pillars, self.settings, sinks).arguments())


class Draw(NamedTuple):
    """A call of `draw_tokens` on greedy rows."""

    logits: Layout

    def run(self, device: torch.device) -> None:
        """Make the tensors and call the op."""
        logits = self.logits.make(device)[0]
        real = torch.zeros(logits.shape[0], dtype=torch.float32, device=device)
        draw_tokens(logits, real, real.long(), real, real, real.long(), real.long())


class Selection(NamedTuple):
    """A call of `select_pillars` without a scored slot."""

    slots: int

    def run(self, device: torch.device) -> None:
        """Make the tensors and call the op."""
        scores = torch.zeros(1, 1, _ALIGNMENT, dtype=torch.float32, device=device)
        slot, count = (torch.zeros(self.slots, dtype=torch.int32, device=device) for _ in range(2))
        pillars = torch.zeros(self.slots, 1, 1, dtype=torch.int32, device=device)
        select_pillars(scores, slot, torch.full_like(slot, -1), slot, pillars, count)


class Proposals(NamedTuple):
    """A call of `propose_ngrams` for so many slots of which none wants a proposal, of `most` tokens at most."""

    slots: int
    most: int

    def run(self, device: torch.device) -> None:
        """Make the tensors and call the op."""
        tokens = torch.zeros(self.slots, _ALIGNMENT, dtype=torch.int64, device=device)
        none = torch.zeros(self.slots, dtype=torch.int32, device=device)
        propose_ngrams(tokens, none, none, self.most)


class Product(NamedTuple):
    """Calls of `quantised_product` for steps of these numbers of rows, one after the other on one weight."""

    inputs: tuple[Layout, ...]
    columns: int
    dtype: torch.dtype

    def run(self, device: torch.device) -> None:
        """Make the tensors and call the op."""
        weight = torch.zeros(self.columns, self.inputs[0].size[-1], dtype=self.dtype, device=device)
        scale = torch.zeros(self.columns, dtype=torch.float32, device=device)
        for layout in self.inputs:
            quantised_product(layout.make(device), weight, scale)


class ExpertsProduct(NamedTuple):
    """Calls of `experts` for steps of these numbers of rows, none of which chooses one.

    The matrices and biases are the model's own, since others of so many experts might not fit into memory.
    """

    x: Layout
    row_counts: tuple[int, ...]
    chosen: int
    weight_dtype: torch.dtype
    matrices: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    settings: ExpertsSettings

    def run(self, device: torch.device) -> None:
        """Make the tensors and call the op."""
        for rows in self.row_counts:
            x = self.x._replace(size=(rows, self.x.size[1])).make(device)
            index = torch.full((rows, self.chosen), -1, dtype=torch.int64, device=device)
            weight = torch.zeros(rows, self.chosen, dtype=self.weight_dtype, device=device)
            experts(*ExpertsCall(x, index, weight, *self.matrices, self.settings).arguments())


class Quantisation(NamedTuple):
    """A call of `quantise_rows` on a single row."""

    inner: int
    dtype: torch.dtype
    kind: str
    paired: bool

    def run(self, device: torch.device) -> None:
        """Make the tensors and call the op."""
        weight = torch.zeros(1, self.inner, dtype=self.dtype, device=device)
        copy = torch.zeros(1, self.inner, dtype=QUANTISED_DTYPES[self.kind], device=device)
        scale = torch.zeros(1, dtype=torch.float32, device=device)
        quantise_rows(weight, self.kind, copy, scale, self.paired)


Call = Attention | Draw | Selection | Proposals | Product | ExpertsProduct | Quantisation


@contextmanager
def kernels_compiled_beside(compiled: CompiledModel, config: SpecConfig, device: torch.device) -> Iterator[None]:
    """Compile the kernels while the body runs, and wait for them at its end. Does nothing on a CPU.

    Raises:
        Whatever failed in a thread, once the body is through. If the body fails, nothing is waited for.
    """
    jobs = [] if device.type == "cpu" else [partial(_run, call, device) for call in calls_of(compiled, config)]
    with done_beside(jobs):
        yield


@contextmanager
def done_beside(jobs: Sequence[Callable[[], None]]) -> Iterator[None]:
    """Do `jobs` in a thread each while the body runs; its end waits for them and raises the first error."""
    if not jobs:
        yield
        return
    threads = ThreadPoolExecutor(len(jobs), thread_name_prefix="sparsespec-warm-up")
    futures = [threads.submit(job) for job in jobs]
    try:
        yield
        for future in futures:
            future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def calls_of(compiled: CompiledModel, config: SpecConfig) -> list[Call]:
    """One call for each kernel that the model's steps need: for each kind of steps, each kind of layer once."""
    slots, kv_layout, regions = config.max_requests, compiled.layout, compiled.split
    drafters = drafters_of(config)
    reads_scores = any(drafter.reads_scores for drafter in drafters)
    any_work = Promise.NOTHING if reads_scores else Promise.NO_SCORES
    unscored = not all(drafter.reads_scores for drafter in drafters)
    few = {Promise.SMALL_TILES, *([Promise.NO_SCORES] if unscored else [])} - {any_work}
    # A region's layouts are renewed when it is verified; those of the flat graph are as they were before projections
    # were fused. Regions come in the order of their calls, and so do their attention nodes, one for each layer.
    nodes = (node for name in regions.calls for node in find_calls(regions.region(name).graph, dual_mode_attention))
    calls: dict[Call, None] = {}
    for node, layer in zip(nodes, kv_layout.layers, strict=True):
        row_counts = (most_rows(config, slots), _FEW_ROWS)
        by_kind = {kind_of_step(rows, layer.q_heads, slots): rows for rows in row_counts}
        for rows, promise in (*((rows, any_work) for rows in by_kind.values()), *((_FEW_ROWS, each) for each in few)):
            given = call_of(AttentionCall, node)
            q, k, v = (layout_of(tensor, rows) for tensor in (given.q, given.k, given.v))
            pool = _part_of_pool(kv_layout, layer, q.dtype)
            sinks = None if given.sinks is None else given.sinks.meta["val"].dtype
            calls[Attention(q, k, v, pool, slots, promise, _alike(layer), sinks)] = None
    (logits,) = compiled.graph_module.graph.output_node().all_input_nodes
    calls[Draw(layout_of(logits, _FEW_ROWS))] = None
    if reads_scores:
        calls[Selection(slots)] = None
    if any(isinstance(drafter, NgramDrafter) for drafter in drafters):
        calls[Proposals(slots, config.most_draft_tokens)] = None
    if config.most_proposals:
        calls[Proposals(slots, config.most_proposals)] = None
    if compiled.draft is not None:
        calls |= dict.fromkeys(_calls_of_drafts(compiled.draft, config))
    return [*calls, *_calls_of_experts(compiled.graph_module, config)]


def _calls_of_experts(graph_module: GraphModule, config: SpecConfig) -> Iterator[Call]:
    """One call for each kind of layers of experts, with every number of rows that is captured."""
    sizes, met = row_counts(most_rows(config, config.max_requests)), set()
    for node in find_calls(graph_module.graph, experts):
        call = ExpertsCall.of(node.args)
        tensors: Any = call
        biases = (None if one is None else _held(graph_module, one) for one in (tensors.up_bias, tensors.down_bias))
        matrices = (_held(graph_module, tensors.up), _held(graph_module, tensors.down), next(biases), next(biases))
        x = layout_of(tensors.x, _FEW_ROWS)
        alike = x, call.settings, *((one.shape, one.stride()) for one in matrices if one is not None)
        if alike not in met:
            met.add(alike)
            weight = tensors.weight.meta["val"].dtype
            yield ExpertsProduct(x, tuple(sizes), tensors.choice.meta["val"].shape[1], weight, matrices, call.settings)


def _held(graph_module: GraphModule, node: Node) -> Tensor:
    """The parameter that a node is, or a transposition of it."""
    if node.op == "get_attr":
        return attribute(graph_module, str(node.target)).detach()
    return _held(graph_module, input_node(node, 0)).transpose(1, 2)


def _calls_of_drafts(draft: DraftForm, config: SpecConfig) -> Iterator[Call]:
    """Products with 8-bit weights, in iterations of up to a row for each slot, and what writes these weights."""
    sizes = row_counts(most_rows(config, config.max_requests))
    most = min(MOST_ROWS["int8"], next(size for size in sizes if size >= config.max_requests))
    for name in draft.split.distinct:
        for node in find_calls(draft.split.region(name).graph, quantised_product):
            weight = input_node(node, 1).meta["val"]
            inputs = tuple(layout_of(input_node(node, 0), size) for size in sizes if size <= most)
            yield Product(inputs, weight.shape[0], weight.dtype)
    kinds = {dtype: kind for kind, dtype in QUANTISED_DTYPES.items()}
    for source, copy, _, paired in draft.copies:
        yield Quantisation(source.shape[1], source.dtype, kinds[copy.dtype], paired)


def _part_of_pool(kv_layout: KVLayout, layer: AttentionLayer, dtype: torch.dtype) -> Layout:
    token = layer.key_dim + layer.value_dim
    size = (_PAGES, layer.kv_heads, kv_layout.page_size, token)
    stride = (kv_layout.elements_per_page, kv_layout.page_size * token, token, 1)
    return Layout(size, stride, kv_layout.page_offset(layer.layer) % _ALIGNMENT, dtype)


def _alike(layer: AttentionLayer) -> AttentionSettings:
    """Settings that take the same kernel as the layer's."""
    scale = 1.0 if layer.scale > 0 else layer.scale
    return AttentionSettings(scale, min(layer.window, 1), float(layer.softcap > 0), layer.chunked)


def layout_of(node: Node, size: int) -> Layout:
    """The layout of a graph's value, every symbolic size being `size`, as near to its storage's beginning as may be."""
    tensor = node.meta["val"]

    def number(value: Any) -> int:
        if isinstance(value, int):
            return value
        expression = value.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, size)))

    return Layout(
        tuple(map(number, tensor.shape)),
        tuple(map(number, tensor.stride())),
        number(tensor.storage_offset()) % _ALIGNMENT,
        tensor.dtype,
    )


def _run(call: Call, device: torch.device) -> None:
    """On a stream of its own: whatever the main thread does on its stream neither waits nor is waited for."""
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        call.run(device)
        torch.cuda.current_stream(device).synchronize()
