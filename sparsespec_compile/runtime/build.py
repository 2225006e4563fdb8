"""Sizes the state by configuration, model and memory, and builds a step over it.

The KV pool takes what everything else leaves. What grows with the longest text besides the pool (scores, pillar
indices, tokens, page tables) is kept to a share of memory by lowering the length that is allowed for. What does not fit
is refused with every figure.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.jupyter import JupyterMixin
from rich.table import Table
from torch import Tensor

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import MemoryPlanError, PoolTooSmallError
from sparsespec_compile.kernels.launch import Promise
from sparsespec_compile.passes.layout import KVLayout
from sparsespec_compile.passes.ranks import Ranks, VocabularyPart
from sparsespec_compile.runtime.device.drafters import Drafter, cycles_of
from sparsespec_compile.runtime.device.graphs import StepRunner
from sparsespec_compile.runtime.device.inputs import MIN_ROWS, InputSizes, StepInputs
from sparsespec_compile.runtime.device.interface import Device, Memory
from sparsespec_compile.runtime.device.state import POOL, Capacity, State, page_bytes, request_pages, state_bytes
from sparsespec_compile.runtime.device.step import Compiler, Forward, Step, Variant, as_it_is
from sparsespec_compile.runtime.device.weights import DraftCopies, DraftGraph
from sparsespec_compile.runtime.host.host_tier import available_host_bytes
from sparsespec_compile.runtime.host.iteration_times import IterationTime
from sparsespec_compile.runtime.host.kv_cache import most_pages
from sparsespec_compile.runtime.host.phases import GROUPED_ROWS, most_together
from sparsespec_compile.runtime.host.ranks import Agreement

_GIB = 2**30
_GRAPH_SHARE = 0.05  # of the free memory, for CUDA graphs and what the allocator cannot place
_TIMED_ROWS = 251
"""Rows of the first step, on which Inductor times the block sizes of its kernels: about those of a large decoding step.
With fewer it could not tell them apart, and what suits the largest step takes twice as long as need be for these (norm
and rotation of queries and keys on an H200, 64 rows: 2.1 and 4.0 us; 256 rows: 3.4 and 6.3). No other size is likely to
be the same: a compiler would take the two for one, and compile once more where they differ."""

_WORKSPACE, _GRAPHS, _COPIES = "activations of a step", "CUDA graphs", "8-bit draft weights"

_COPIES_SHARE = 0.25
"""Of what may be used beside the weights, for the copies of weights that drafts read, where they are not asked for by
name: beyond, more requests decoded together are worth more than cheaper drafts."""


@dataclass(frozen=True)
class MemoryPlan(JupyterMixin):
    """Bytes that a state and its steps need, beside what is free.

    Attributes:
        parts: bytes by what they are for.
        available: bytes that the parts may take together, of the weights and of what was free beside them; None = not
            limited (CPU).
    """

    parts: dict[str, int]
    available: int | None

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def require(self) -> None:
        """Raises MemoryPlanError, with every figure, unless the parts fit."""
        if self.available is not None and self.total > self.available:
            figures = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in self.parts.items())
            remedy = ", choose draft_weights='exact'" if _COPIES in self.parts else ""
            raise MemoryPlanError(
                f"{self.available / _GIB:.2f} GiB of the device may be used, and {self.total / _GIB:.2f} are needed: "
                f"{figures}. Lower SpecConfig.max_requests, max_length, pool_tokens or prefill_chunk, raise "
                f"memory_fraction{remedy}, or free memory."
            )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("memory", "GiB", title="memory plan")
        for name, size in (*self.parts.items(), ("together", self.total)):
            table.add_row(name, f"{size / _GIB:.2f}")
        if self.available is not None:
            table.add_row("free on the device", f"{self.available / _GIB:.2f}")
        yield table


@dataclass(frozen=True)
class Target:
    """What the engine runs: the rewritten graph and what is known about it.

    Attributes:
        forward: the graph, see `step.Forward`.
        layout: its layers and their place in the pool.
        ranks: the ranks that share the model; None when it is whole.
        vocabulary: the tokens of which the graph gives logits; None = all.
        dtype: of keys and values.
        device: where it runs.
        compiler: applied to the functions around the graph; such as `torch.compile`.
        iteration_time: what "auto" predicts iterations to take; None = only measured times tell.
        weight_bytes: what the model's parameters take on the device, for the memory plan.
        weights: parameters and buffers that K/V depend on; K/V are kept for later texts until one of them changes.
        fewest_rows: rows, and rows with logits, that the graph takes at least. On a CPU a product of one row takes half
            the time of one of two.
        positions: tokens of the longest text that the model is meant for; None = not known.
        drafts: the graph for iterations of nothing but drafts; None = `forward` runs them too.
    """

    forward: Forward
    layout: KVLayout
    dtype: torch.dtype
    device: torch.device
    compiler: Compiler = as_it_is
    iteration_time: IterationTime | None = None
    weight_bytes: int = 0
    weights: tuple[Tensor, ...] = ()
    fewest_rows: int = MIN_ROWS
    positions: int | None = None
    ranks: Ranks | None = None
    drafts: DraftGraph | None = None
    vocabulary: VocabularyPart | None = None


def capacity_for(config: SpecConfig, drafters: Sequence[Drafter], slots: int, tokens: int, pages: int) -> Capacity:
    """Sizes of a state for `slots` requests of up to `tokens` tokens and a pool of `pages`.

    A compiled graph treats sizes of 0 and 1 as special cases; sizes from 2 on share one compilation.
    """
    scored = 2
    if any(drafter.reads_scores for drafter in drafters):
        together = most_together(config.schedule, cycles_of(config)[-1], slots)
        if config.draft_tokens == "auto":
            together = max(together, -(-slots // 2), GROUPED_ROWS // 2)  # as in cycles of one draft
        scored = max(2, min(slots, max(together, 8)))
    return Capacity(max(slots, 2), max(tokens, 2), max(pages, 2), max(2, min(config.budget(tokens), tokens)), scored)


def build_runner(
    target: Target,
    config: SpecConfig,
    drafters: Sequence[Drafter],
    capacity: Capacity,
    device: Device,
    asked: int,
    agreement: Agreement | None = None,
) -> tuple[StepRunner, MemoryPlan]:
    """Allocate everything but the pool, find out what a step needs beside it, then give the pool what is left.

    All of it belongs to the current stream of `device`. The step holds the copies of weights that drafts read until
    they are given back.

    Args:
        asked: pages that the requests which were asked for need, those of the pool at most.
        agreement: with the ranks that share the model, which all build theirs; None = it is whole.

    Raises:
        MemoryPlanError: the device's free memory does not suffice; the text has every figure.
        PoolTooSmallError: an allocation failed. Where ranks share the model, all of them raise one of the two.
    """
    alone: Callable[[], AbstractContextManager[None]] = nullcontext if agreement is None else agreement.alone
    refused = partial(_refused, config, capacity)
    step: Step | None = None
    try:
        with alone(), refused():
            state = State(target.layout, replace(capacity, pages=2), target.dtype, device)
            step = Step(
                target.forward,
                state,
                _inputs(target, config, capacity),
                drafters,
                config.most_draft_tokens,
                target.compiler,
                target.vocabulary,
                config.most_proposals,
            )
        with refused():  # steps are run, in which ranks wait for each other
            graphs = device.graphs() if config.cuda_graphs else None
            # What graphs keep for their activations stays theirs while the next one is warmed up outside of it.
            workspace = _workspace_bytes(step, device.memory) * (1 if graphs is None else 2)
        plan_for = partial(_plan_memory, target, config, capacity, workspace, device.memory)
        with alone():
            plan = plan_for(None)
        if target.drafts is not None:
            plan = _plan_copies(
                target.drafts, plan_for, plan, asked * page_bytes(target.layout, target.dtype), agreement
            )
            if _COPIES in plan.parts:
                with alone(), refused():
                    target.drafts.copies.hold(step)
                with refused():
                    _give_drafts(step, target.drafts, device.memory)
        pages = plan.parts[POOL] // page_bytes(target.layout, target.dtype)
        pages = pages if agreement is None else agreement.least(pages)[0]
        with alone(), refused():
            state.give_pool(pages)
    except BaseException:
        if target.drafts is not None and step is not None:
            target.drafts.copies.give_back(step)
        raise
    return StepRunner(step, graphs, fewest_rows=target.fewest_rows, shared=target.ranks is not None), plan


@contextmanager
def _refused(config: SpecConfig, capacity: Capacity) -> Iterator[None]:
    """Say by name that an allocation failed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise PoolTooSmallError(
            f"No memory for the state of {capacity.slots} requests of up to {capacity.tokens} tokens and a KV pool "
            f"of {capacity.pages} pages of {config.page_size} tokens. Lower SpecConfig.max_requests or pool_tokens, or "
            "max_new_tokens."
        ) from error


def most_rows(config: SpecConfig, slots: int) -> int:
    """Packed rows of the largest step: every slot verifies, beside a chunk of prompts."""
    return max(slots * (config.most_draft_tokens + 1) + config.prefill_chunk, MIN_ROWS)


def _inputs(target: Target, config: SpecConfig, capacity: Capacity) -> StepInputs:
    decoding = capacity.slots * (config.most_draft_tokens + 1)
    sizes = InputSizes(
        slots=capacity.slots,
        rows=most_rows(config, capacity.slots),
        logits=max(decoding, MIN_ROWS),
        request_pages=request_pages(target.layout, capacity),
        updates=len(target.layout.groups) * (4 * decoding + target.layout.pages_for(config.prefill_chunk)),
    )
    return StepInputs(sizes, target.device)


def _plan_memory(
    target: Target,
    config: SpecConfig,
    capacity: Capacity,
    workspace: int,
    memory: Memory | None,
    copies: DraftCopies | None = None,
) -> MemoryPlan:
    """What everything takes. The pool gets what was asked for, or, if that is not fixed, what the rest leaves of it."""
    parts = {"weights": target.weight_bytes} | state_bytes(target.layout, capacity, target.dtype)
    taken = sum(parts.values()) - parts[POOL]
    if copies is not None:
        parts[_COPIES] = copies.bytes
        taken += copies.held_bytes
    if memory is None:
        return MemoryPlan(parts, None)
    available = memory.free() + taken
    parts |= {_WORKSPACE: workspace, _GRAPHS: int(available * _GRAPH_SHARE)}
    if config.pool_tokens is None:
        page = page_bytes(target.layout, target.dtype)
        weights = target.weight_bytes
        available = weights + int((available - weights) * config.memory_fraction)  # the weights are there already
        rest = available - sum(parts.values()) + parts[POOL]
        # A pool of less than two pages holds no request: then its two pages are refused with every figure.
        parts[POOL] = max(min(parts[POOL], rest // page * page), 2 * page)
    plan = MemoryPlan(parts, available)
    plan.require()
    return plan


def _plan_copies(
    drafts: DraftGraph,
    plan_for: Callable[[DraftCopies | None], MemoryPlan],
    without: MemoryPlan,
    asked: int,
    agreement: Agreement | None = None,
) -> MemoryPlan:
    """The plan with the copies of weights that drafts read, or without them where memory is short, on any rank.

    Args:
        asked: bytes of the pool that the requests which were asked for need.

    Raises:
        MemoryPlanError: they do not fit, and the settings ask for them by name.
    """
    reason, plan = None, without
    with nullcontext() if agreement is None else agreement.alone():
        try:
            plan = plan_for(drafts.copies)
            if not drafts.required:
                reason = _why_left_out(plan, without, asked)
        except MemoryPlanError as error:
            if drafts.required:
                raise
            reason = str(error)
    if agreement is not None and agreement.least(reason is None) == [False]:
        reason = reason or "another rank has no room for its own"
    size = f"{drafts.copies.bytes / _GIB:.2f} GiB"
    drafts.settled(
        f"{drafts.copies.kind} copies of {drafts.copies.count} weights, {size}"
        if reason is None
        else f"exact weights, as {drafts.copies.kind} copies would take {size}: {reason}"
    )
    return plan if reason is None else without


def _why_left_out(plan: MemoryPlan, without: MemoryPlan, asked: int) -> str | None:
    """Why copies are not worth their memory; None where they are."""
    if plan.available is None:
        return None
    share = plan.parts[_COPIES] / (plan.available - plan.parts["weights"])
    if share > _COPIES_SHARE:
        return f"{share:.0%} of what may be used beside the weights, and {_COPIES_SHARE:.0%} are the limit"
    if plan.parts[POOL] < asked <= without.parts[POOL]:
        return f"the KV pool would have {plan.parts[POOL] / _GIB:.2f} GiB, and the requests need {asked / _GIB:.2f} GiB"
    return None


def _give_drafts(step: Step, drafts: DraftGraph, memory: Memory | None) -> None:
    """Let the step run drafts by a graph of their own; where runs also time block sizes, one does so here."""
    step.drafts = drafts
    if memory is not None:
        rows = min(max(step.state.capacity.slots, MIN_ROWS), drafts.most_rows)
        step(rows, rows, Variant(promise=Promise.SMALL_TILES, draft_weights=True))


def _workspace_bytes(step: Step, memory: Memory | None) -> int:
    """What a step of the most rows takes beside its state, found by running one without work; 0 without a limit.

    The first runs also compile, the last one counts. It gives log-probabilities, which takes most.
    """
    if memory is None:
        return 0
    sizes, largest = step.inputs.sizes, replace(step.any_work, logprobs=True)
    for rows, logits in first_runs(sizes):
        step(rows, logits, largest)
    return memory.taken_by(partial(step, sizes.rows, sizes.logits, largest))


def first_runs(sizes: InputSizes) -> list[tuple[int, int]]:
    """Rows, and rows with logits, of the steps that compile: one to time block sizes on, and the largest."""
    # Without drafts there are as many logit rows as slots, and in most steps as many as rows; here neither holds.
    timed = [(_TIMED_ROWS, max(MIN_ROWS, min(sizes.logits, _TIMED_ROWS) - 1))] if sizes.rows > _TIMED_ROWS else []
    return [*timed, (sizes.rows, sizes.logits)]


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch's error on a CPU is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


_DEFAULT_LENGTH = 32768
"""Tokens of the longest text of a model that does not say how many positions it has."""

_LENGTH_SHARE = 0.1
"""Of the memory, for what grows with the longest text besides the pool."""

_HOST_SHARE = 0.5
"""Of the free host memory, for the state of a model on a CPU. Pages of it that are never used take none."""

_SHORTEST = 1024
"""Tokens of a text that are allowed for whatever memory there is."""


def engine_capacity(
    target: Target, config: SpecConfig, drafters: Sequence[Drafter], device: Device, longest: int
) -> Capacity:
    """Sizes of the engine's state. The pool's pages are those that could be used; memory may leave room for fewer.

    Args:
        longest: tokens of the longest request that has been asked for; counts where it exceeds the model's positions.
    """
    memory = usable_bytes(device, config)
    length = config.max_length or max(target.positions or _DEFAULT_LENGTH, longest)
    if config.pool_tokens is not None:
        length = min(length, config.pool_tokens)
    capacity = _capacity(target.layout, config, drafters, length)
    shortest = max(_SHORTEST, longest)
    while config.max_length is None and length > shortest:
        parts = state_bytes(target.layout, capacity, target.dtype)
        if sum(parts.values()) - parts[POOL] <= _LENGTH_SHARE * memory:
            break
        length = max(length * 3 // 4, shortest)
        capacity = _capacity(target.layout, config, drafters, length)
    if config.pool_tokens is None and device.memory is None:
        most = max(2, memory // page_bytes(target.layout, target.dtype))
        capacity = capacity.with_pages(min(capacity.pages, most))
    return capacity


def usable_bytes(device: Device, config: SpecConfig) -> int:
    """Memory that the engine may take, of what is free."""
    if device.memory is not None:
        return int(device.memory.free() * config.memory_fraction)
    return int(available_host_bytes() * _HOST_SHARE)


def pages_of(layout: KVLayout, config: SpecConfig, lengths: Iterable[int]) -> int:
    """Pages that the longest requests of these lengths need, as many as are decoded together."""
    longest = sorted(lengths, reverse=True)[: config.max_requests]
    return sum(most_pages(layout, length, config.most_draft_tokens + 1, config.prefill_chunk) for length in longest)


def _capacity(layout: KVLayout, config: SpecConfig, drafters: Sequence[Drafter], length: int) -> Capacity:
    pages = config.max_requests * most_pages(layout, length, config.most_draft_tokens + 1, config.prefill_chunk)
    if config.pool_tokens is not None:
        pages = config.pool_tokens // layout.page_size * len(layout.groups)
    return capacity_for(config, drafters, config.max_requests, length, pages)
