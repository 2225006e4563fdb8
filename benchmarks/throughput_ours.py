"""This project in the throughput benchmark: one compiled model, and an engine for each settings over it.

`optimize` compiles once. An engine is what settings make of the compiled graph: its state, its captured steps and its
choice of drafts. So engines of all settings run one after the other over the same graph and the same KV pool, in which
the K/V of prompts are computed once (`kept_prompts.py`). Every engine is watched token by token: the clock runs from
the moment when every request decodes until the first one ends, or, where a batch drains, the last. Before the clock
starts, a short run of as many requests compiles and captures what is needed.
"""

import gc
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from decoding_clock import Clock
from gpu_trace import NoTraceError, advance, gpu_events, idle_share
from kept_prompts import KeptPool, KeptPrompts
from speed_of_light import SpeedOfLight
from transformers import PreTrainedModel
from workloads import Load, Measured, Workload
from wrong_drafts import Share, WrongDrafts

import sparsespec_compile as ss
from sparsespec_compile.advice.ceilings import ceilings_of
from sparsespec_compile.passes.cost.graph import graph_cost
from sparsespec_compile.runtime.host.engine import Engine

_PREFILL_CHUNK = 8192
"""Prompts are outside the clock; in large chunks all are read before the first request ends."""

_WARM_UP_PROMPT, _WARM_UP_TOKENS = 64, 48
_WARM_UP = _WARM_UP_PROMPT + _WARM_UP_TOKENS
"""Tokens of the run before the clock: for a few cycles."""

_COMPILED_FOR = ("page_size", "backend", "ceilings")
"""Settings of the compiler's: alike for all engines over a compiled model."""


@dataclass(frozen=True)
class Group:
    """Workloads whose prompts the pool holds together.

    Attributes:
        workloads: in their order.
        loads: what each asks for, by workload.
        prompts: those of all of them.
    """

    workloads: tuple[Workload, ...]
    loads: Mapping[Workload, Load]
    prompts: KeptPrompts

    @property
    def most_requests(self) -> int:
        """Of a workload."""
        return max(workload.requests for workload in self.workloads)

    @property
    def longest(self) -> int:
        """Tokens of the longest text, of a run before the clock at least."""
        return max(_WARM_UP, *(workload.length + workload.new_tokens for workload in self.workloads))

    @property
    def pool_tokens(self) -> int:
        """Tokens of a pool for all prompts, and the new tokens of any workload."""
        return max(self.prompts.pool_tokens(one.requests, max(one.new_tokens, _WARM_UP)) for one in self.workloads)


class Ours:
    """A compiled model, on which engines of several settings run in turn.

    Args:
        model: compiled for `settings`.
        settings: `SpecConfig` fields of all engines, in which those of the compiler must be alike.
        requests: of the largest workload. Every engine has room for so many.
        ranks: that share the model.
    """

    def __init__(
        self, model: PreTrainedModel, settings: Sequence[Mapping[str, Any]], requests: int, ranks: int = 1
    ) -> None:
        compiled_for = [{name: one.get(name) for name in _COMPILED_FOR} for one in settings]
        if any(one != compiled_for[0] for one in compiled_for):
            raise SystemExit(f"--settings: {', '.join(_COMPILED_FOR)} must be alike in one run, got {compiled_for}.")
        self._common = {"max_requests": max(requests, 1), "prefill_chunk": _PREFILL_CHUNK, "host_pool_tokens": 0}
        if ranks > 1:
            self._common["tensor_parallel"] = ranks
        common = {name: value for name, value in compiled_for[0].items() if value is not None}
        common["draft_weights"] = draft_weights(settings)
        most = max([ss.SpecConfig().max_draft_tokens, *(one.get("max_draft_tokens", 1) for one in settings)])
        self._fast = ss.optimize(model, ss.SpecConfig(**self._common, **common, max_draft_tokens=most))
        self._target = self._fast._engine.target
        self._pool = KeptPool(self._target)
        self._share = Share(self._target.device)
        self._light: SpeedOfLight | None = None
        if model.device.type == "cuda":
            exact, draft = self._fast._compiled.graph_module, self._fast._compiled.draft
            drafts = None if draft is None else graph_cost(draft.graph_module)
            self._light = SpeedOfLight(
                graph_cost(exact), self._target.dtype.itemsize, ceilings_of(model.device), drafts
            )

    def start(self, settings: Mapping[str, Any], group: Group, *, spoiled: bool) -> None:
        """An engine of its own settings for the workloads of a group, in place of the one before.

        `spoiled`: whether drafts may be wrong on purpose.
        """
        self._stop()
        sizes = {"pool_tokens": group.pool_tokens, "max_length": group.longest}
        config = ss.SpecConfig(**self._common, **sizes, **settings)
        target = self._target
        if config.draft_weights == "exact" or config.draft_tokens == 0:
            target = replace(target, drafts=None)
        if spoiled:
            target = replace(target, forward=WrongDrafts(target.forward, self._share, target.compiler))
            if target.drafts is not None:
                drafting = WrongDrafts(target.drafts.forward, self._share, target.compiler)
                target = replace(target, drafts=replace(target.drafts, forward=drafting))
        self._fast.spec_config = config
        self._fast._engine = Engine(target, config, self._pool)
        group.prompts.give(self._fast._engine)
        load = group.loads[max(group.workloads, key=lambda workload: workload.requests)]
        self._share.set(1.0)
        with self._fast.stream([p[:_WARM_UP_PROMPT] for p in load.prompts], _sampling(load, _WARM_UP_TOKENS)) as pieces:
            for _ in pieces:
                pass

    def measure(self, workload: Workload, group: Group, *, runs: int, seconds: float, idle: bool) -> Measured:
        """Decode a workload, several times, and take the median of the tokens a second.

        Args:
            workload: one of the group's.
            group: that the engine was started for.
            runs: at most.
            seconds: no further run begins once the runs before took so long together.
            idle: whether to trace the GPU as well.
        """
        load = group.loads[workload]
        self._share.set(workload.right)
        measured: list[Measured] = []
        began = time.perf_counter()
        shared = "tensor_parallel" in self._common  # then all ranks must make the same runs, whatever their clocks say
        while len(measured) < runs and (not measured or shared or time.perf_counter() - began < seconds):
            measured.append(self._run(load))
            group.prompts.computed(self._fast._engine, load.prompts)
        speeds = [one.tokens_per_second for one in measured]
        median = min(measured, key=lambda one: abs(one.tokens_per_second - statistics.median(speeds)))
        return replace(median, runs=tuple(speeds), gpu_idle_share=self._idle(load) if idle else None)

    def close(self) -> None:
        """Give all memory but the model's back."""
        self._stop()
        self._pool.drop()

    def _stop(self) -> None:
        self._fast.release()
        release_memory()

    def _run(self, load: Load) -> Measured:
        fast, clock = self._fast, Clock(load)
        texts: list[list[int]] = [[] for _ in load.prompts]
        # Slots hold texts of the run before, which are the same: n-grams would know what comes.
        fast._engine._session.forget_ended_texts()
        with_draft_weights: dict[int, int] = {}  # iterations with 8-bit weights, by all iterations
        with fast.stream(load.prompts, _sampling(load)) as pieces:
            for piece in pieces:
                texts[piece.index] += piece.token_ids
                clock.came(piece.index, len(piece.token_ids), fast.stats.iterations, time.perf_counter())
                with_draft_weights[fast.stats.iterations] = fast.stats.draft_weight_iterations
        stats, seconds = fast.stats, clock.seconds_per_iteration()
        first, last = (stats.iterations - at for at in clock.iterations)
        before, after = (with_draft_weights[at] for at in clock.iterations)

        def timed(kept: Sequence[Any]) -> list[Any]:
            """What belongs to iterations while the clock ran, of those that are kept."""
            return list(islice(kept, max(0, len(kept) - first), len(kept) - last))

        kinds = Counter(timed(stats.cycle_by_iteration))
        (choice, times), light = kinds.most_common(1)[0], None
        if self._light is not None:
            rows, kv_read = timed(stats.rows_by_iteration), timed(stats.kv_read_by_iteration)
            light = self._light.seconds(rows, kv_read, after - before) / seconds
        drafted = stats.cycles > 0
        return Measured(
            tokens_per_second=clock.tokens_per_second(),
            ms_per_iteration=1e3 * seconds,
            accepted_per_cycle=stats.accepted_per_cycle if drafted else None,
            drafts_per_cycle=stats.drafts_per_cycle if drafted else None,
            drafts_right=drafts_right(stats),
            choice=" ".join(map(str, choice)),
            choice_share=times / kinds.total(),
            light_share=light,
            tokens_per_iteration=clock.tokens_per_second() * seconds,
            kv_bytes_share=stats.kv_bytes_share,
            texts=texts,
        )

    def _idle(self, load: Load) -> float | None:
        """From a trace of 30 iterations of short texts: gaps between steps do not depend on length, steps do."""
        with self._fast.stream([prompt[:512] for prompt in load.prompts], _sampling(load)) as pieces:
            advance(pieces, self._fast, 30)
            try:
                return idle_share(gpu_events(lambda: advance(pieces, self._fast, 30)))
            except NoTraceError as error:
                print(f"gpu_idle_share is left open: {error}")
                return None


def _sampling(load: Load, new_tokens: int | None = None) -> list[ss.SamplingParams]:
    return [
        ss.SamplingParams(
            max_new_tokens=new_tokens or load.new_tokens_of(i),
            temperature=load.temperature,
            seed=load.seed + i,
            stop_token_ids=(),
        )
        for i in range(len(load.prompts))
    ]


def draft_weights(settings: Sequence[Mapping[str, Any]]) -> str:
    """What the graph is compiled for: engines of exact drafts leave its second form alone.

    Ends the command where settings ask for different copies.
    """
    drafting = (one for one in settings if one.get("draft_tokens") != 0 and one.get("drafter") != "ngram")
    kinds = {one.get("draft_weights", "auto") for one in drafting} - {"exact"}
    if len(kinds) > 1:
        raise SystemExit(f"--settings: draft_weights must be exact or alike in one run, got {sorted(kinds)}.")
    return kinds.pop() if kinds else "exact"


def drafts_right(stats: ss.Stats) -> float | None:
    """Of the drafts of full cycles whose predecessors were right, the share that was; None where none was judged."""
    kinds = list(stats.by_cycle.values())
    tried = sum(kind.tried for kind in kinds)
    return sum(sum(kind.accepted_at) for kind in kinds) / tried if tried else None


def release_memory() -> None:
    """Give back what a finished engine held."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
