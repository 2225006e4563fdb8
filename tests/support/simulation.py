"""A device that is only simulated, under the real scheduler, phases, cache and chooser: a generation in a second.

Which drafts are right is drawn, how long iterations take is a formula, and results are read one iteration late, as the
engine does.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import Qwen3Config

import sparsespec_compile as ss
from sparsespec_compile.advice.ceilings import H200, Ceilings
from sparsespec_compile.advice.config_cost import config_cost
from sparsespec_compile.advice.prediction import TermTime, predict
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.passes.cost.terms import Iteration
from sparsespec_compile.passes.layout import AttentionLayer, KVLayout
from sparsespec_compile.runtime.device.devices import CpuDevice
from sparsespec_compile.runtime.device.drafters import Drafter, NgramDrafter, cycles_of
from sparsespec_compile.runtime.device.graphs import padded, row_counts
from sparsespec_compile.runtime.device.inputs import Work
from sparsespec_compile.runtime.host.cycle_chooser import CycleChooser, Pace
from sparsespec_compile.runtime.host.host_tier import HostTier
from sparsespec_compile.runtime.host.kv_cache import KVCacheManager
from sparsespec_compile.runtime.host.phases import Phases
from sparsespec_compile.runtime.host.request import Request
from sparsespec_compile.runtime.host.scheduler import Limits, Scheduler

QWEN3_8B = Qwen3Config(
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=12288,
    num_hidden_layers=36,
    vocab_size=151936,
)
COST = config_cost(QWEN3_8B, torch.bfloat16)

AS_MEASURED = replace(H200, gemm_overhead_s=8e-6, scoring_overhead_s=8e-6, gather_bytes_per_s=4.3e12)
"""Under which the formula gives what an H200 was measured to take, within some percent (benchmarks/results)."""

AS_TIMED = replace(AS_MEASURED, flops_per_s=900e12)
"""With `SHARP` products: under which 64 requests at 1,024 tokens take what they took on an H200 (benchmarks/results/
h200-throughput.json), 7.54 ms in plain decoding and 9.19 ms with 3 n-grams."""

SHARP = 3.0
"""The exponent under which (reading ** n + computing ** n) ** (1 / n) follows the products of a layer that were timed
at 2 to 256 rows. Predictions take 2, and so overrate what some more rows cost."""

as_run = partial(padded, sizes=row_counts(64 * 13 + 4096))
"""The rows of the graph that so many rows run in."""

LOOKS = 0.5
"""Share of choices before which the host looks n-grams up, as it may not take much of the time."""

_PAGE = 256


@dataclass(frozen=True)
class Text:
    """How often drafts are right: each by the model, the first n-gram, and each further one behind a right one."""

    by_model: float
    ngram: float
    further: float = 0.6

    def accepted(self, drafter: Drafter, drafts: int, chance: random.Random) -> int:
        """Of so many drafts the first that are right."""
        ngrams = isinstance(drafter, NgramDrafter)
        for nth in range(drafts):
            right = (self.further if nth else self.ngram) if ngrams else self.by_model
            if chance.random() >= right:
                return nth
        return drafts


@dataclass
class Simulation:
    """One engine; what its chooser learns stays from one generation to the next.

    Args:
        text: what is written.
        config: its settings; without "auto" it stays with one cycle.
        chooser: chooses cycles; None = they stay as they are.
        device: as which it computes.
        sharpness: how little products take beyond the longer of reading and computing, see `SHARP`.
        draft_weights: time of products in iterations of nothing but drafts over that in others.
        noise: standard deviation of an iteration's time.
        hiccups: share of iterations that take half as long again.
    """

    text: Text
    config: ss.SpecConfig
    chooser: CycleChooser | None = None
    device: Ceilings = AS_MEASURED
    sharpness: float = 2.0
    draft_weights: float = 1.0
    noise: float = 0.02
    hiccups: float = 0.0
    seed: int = 0
    cycles: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._pace = Pace()
        self._ngrams = next((c.drafter for c in cycles_of(self.config) if isinstance(c.drafter, NgramDrafter)), None)
        self._proposer = NgramDrafter(self.config)

    def generate(self, lengths: Sequence[int], new_tokens: Sequence[int]) -> float:
        """Tokens a second of requests with prompts of these lengths, prompts aside, to the end of the last."""
        self.cycles.clear()
        scheduler = self._scheduler(len(lengths), max(map(sum, zip(lengths, new_tokens, strict=True))))
        scheduler.waiting.extend(Request([0] * n, new) for n, new in zip(lengths, new_tokens, strict=True))
        self._pace = Pace()
        if self.chooser is not None:
            self.chooser.began()
            scheduler.set_cycle(self.chooser.current)
        flight: deque[tuple[list[tuple[Request, Work]], float]] = deque()
        seconds, tokens, landed = 0.0, 0, 0
        while scheduler.busy or flight:
            scheduler.admit()
            work = scheduler.plan()
            scheduler.kv_cache.updates.clear()
            if work:
                self.cycles.append((scheduler.cycle.name, scheduler.cycle.drafts))
                flight.append((work, self._seconds(work)))
            if len(flight) == 2 or not work:
                work, took = flight.popleft()
                prompts = any(item.mode == Mode.PREFILL for _, item in work)
                written = self._land(scheduler, work)
                seconds, tokens = (seconds, tokens) if prompts else (seconds + took, tokens + written)
                landed += 1
                self._choose(scheduler, None if prompts else took, landed)
        return tokens / seconds

    def _scheduler(self, slots: int, longest: int) -> Scheduler:
        layout = KVLayout((AttentionLayer(0, 1, 1, 1, 1, 1.0, 0, 0.0),), page_size=_PAGE)
        pages = slots * (longest // _PAGE + 3)
        tier = HostTier(CpuDevice().stream(), torch.zeros(2, 1), 0)
        rows = self.config.most_draft_tokens + 1
        kv_cache = KVCacheManager(layout, pages, tier, updates=10**6, cycle_tokens=rows, prefill_chunk=10**6)
        limits = Limits(slots, cycles_of(self.config)[-1], 10**6, max(slots, 2))
        return Scheduler(limits, kv_cache, Phases(limits.cycle, self.config.schedule, limits.scored))

    def _land(self, scheduler: Scheduler, work: list[tuple[Request, Work]]) -> int:
        written = 0
        for request, item in work:
            if request.finished:
                continue
            if item.mode == Mode.DRAFT:
                before, request.told_drafted = request.told_drafted, self._drafted(request, item)
                proposals = min(item.rows, item.most - before) - 1
                if self.chooser is not None and self._ngrams is not None and item.offset < 0 and proposals > 0:
                    self.chooser.verified(self._ngrams, proposals, request.told_drafted - before - 1)
                continue
            drafts = item.rows - 1 if item.mode == Mode.VERIFY and item.drafter is not None else 0
            drafts = drafts if item.offset >= 0 else request.told_drafted
            request.told_drafted = 0
            right = self.text.accepted(item.drafter, drafts, self._chance) if item.drafter is not None else 0
            added = len(request.append([0] * (right + 1) if item.logits else [], []))
            written += added
            if item.mode == Mode.VERIFY:
                request.unread -= item.rows
                if self.chooser is not None and item.drafter is not None:
                    right = min(right, added)
                    self.chooser.verified(item.drafter, right if request.finished else drafts, right)
            if request.finished:
                scheduler.release(request)
        return written

    def _drafted(self, request: Request, item: Work) -> int:
        """Drafts of its cycle after a draft iteration."""
        if item.offset >= 0:
            return item.offset + 1
        rows = min(item.rows, item.most - request.told_drafted)
        if rows < 1:
            return request.told_drafted
        return request.told_drafted + 1 + self.text.accepted(self._proposer, rows - 1, self._chance)

    def _choose(self, scheduler: Scheduler, took: float | None, landed: int) -> None:
        if self.chooser is None:
            return
        decoding = [request.reach for request in scheduler.running if request.phase is not None]
        if took is not None:
            self.chooser.took(took, decoding)
        if self._pace.other_load(len(decoding)):
            self.chooser.began()
        if not self._pace.due(landed, len(decoding)):
            return
        looks = landed > 1 and decoding and self._chance.random() < LOOKS
        if self._ngrams is not None and scheduler.cycle.drafter != self._ngrams and looks:
            for _ in range(14):  # as `Foresight` gives of 24 tokens or so
                most = self.config.most_draft_tokens
                self.chooser.verified(self._ngrams, most, self.text.accepted(self._ngrams, most, self._chance))
        chosen = self.chooser.choose(decoding)
        self._pace.chose(landed, len(decoding), chosen, changed=chosen != scheduler.cycle)
        scheduler.set_cycle(chosen)

    def _seconds(self, work: list[tuple[Request, Work]]) -> float:
        drafting = [request for request, item in work if item.mode == Mode.DRAFT]
        verifying = [(request, item) for request, item in work if item.mode == Mode.VERIFY]
        if len(drafting) + len(verifying) < len(work):
            return 0.0
        requests = [*drafting, *(request for request, _ in verifying)]
        length = sum(request.reach for request in requests) / len(requests)
        rows = sum(item.rows for _, item in work)
        drafts = (
            sum(item.rows for _, item in verifying) / len(verifying) - 1 if verifying else self.config.most_draft_tokens
        )
        computed = as_run(rows)
        seconds = step_seconds(
            Iteration(
                computed, computed, len(drafting), len(verifying), length, drafts, self.config.budget(round(length))
            ),
            self.device,
            scored=any(item.scored for _, item in verifying),
            draft_weights=1.0 if verifying else self.draft_weights,
            sharpness=self.sharpness,
        )
        hiccup = 1.5 if self._chance.random() < self.hiccups else 1.0
        return seconds * hiccup * max(0.9, self._chance.gauss(1.0, self.noise))


def step_seconds(
    iteration: Iteration, device: Ceilings, *, scored: bool, draft_weights: float, sharpness: float = 2.0
) -> float:
    """The time of one iteration."""
    time = predict(COST, iteration, device if scored else replace(device, scoring_overhead_s=0.0))
    products = [term for term in time.terms if "projection" in term.name]
    weights = sum(term.seconds for term in products)
    sharper = sum(_product_seconds(term, device, sharpness) for term in products)
    scores = 0.0 if scored else sum(term.seconds for term in time.terms if term.name == "scores")
    return time.seconds - scores - weights + draft_weights * sharper


def _product_seconds(term: TermTime, device: Ceilings, sharpness: float) -> float:
    reading, computing = term.bytes / device.read_bytes_per_s, term.flops / device.flops_per_s
    return (reading**sharpness + computing**sharpness) ** (1 / sharpness)
