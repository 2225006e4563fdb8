"""The engines of the throughput benchmark, each behind one function that times decoding and leaves out the prompts.

An engine of ours is watched token by token: the clock runs from the moment when every request decodes until the first
one ends, or, where a batch drains, the last. HuggingFace's `generate` is watched step by step. Other engines are black
boxes: they run twice, for `short` and for all new tokens, and what the longer run takes beyond the shorter one is
decoding alone. Whatever is timed has run before, with the same lengths.
"""

import gc
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu_trace import NoTraceError, advance, gpu_events, idle_share
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import sparsespec_compile as ss


class EngineMissingError(ss.SparseSpecError, ImportError):
    """An optional engine is not installed."""


class TooShortError(ss.SparseSpecError, ValueError):
    """The texts are too short to be timed."""


_SETTLED = 16
"""Tokens of every request before the clock starts, and of the first to end after it stops."""


_LEAST_DIFFERENCE = 0.05
"""By which a black box's longer run must exceed its shorter one for the difference to be more than noise."""


@dataclass(frozen=True)
class Load:
    """What every engine is given.

    Attributes:
        prompts: token ids.
        new_tokens: tokens of each text, or of the longest.
        temperature: 0 = greedy.
        seed: of the first text; the others count on.
        drains: texts end one after the other, the first with a quarter of the last one's new tokens.
    """

    prompts: list[list[int]]
    new_tokens: int
    temperature: float
    seed: int
    drains: bool = False

    def new_tokens_of(self, index: int) -> int:
        """New tokens of a text."""
        others = max(1, len(self.prompts) - 1)
        return self.new_tokens * (others + 3 * index) // (4 * others) if self.drains else self.new_tokens

    @property
    def short(self) -> int:
        """New tokens of a black box's shorter run, and those before the clock where steps are watched."""
        return max(1, self.new_tokens // 5)


@dataclass(frozen=True)
class Measured:
    """What an engine did while the clock ran; None where it does not tell."""

    tokens_per_second: float
    ms_per_iteration: float | None = None
    accepted_per_cycle: float | None = None
    tokens_per_iteration: float | None = None
    kv_bytes_share: float | None = None
    gpu_idle_share: float | None = None
    texts: list[list[int]] | None = None


Runner = Callable[[PreTrainedModel, Load, Mapping[str, Any]], Measured]


class Clock:
    """Times tokens as they come, while all requests decode, or, of a batch that drains, from then on to the end.

    Requests that verify together get their tokens together, and how many such bursts lie between two times depends on
    the times. So while all decode each request is timed from one piece of its text to another, and speeds are added up.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._counts = [0] * len(load.prompts)
        self._first: dict[int, tuple[float, int]] = {}
        self._last: dict[int, tuple[float, int]] = {}
        self._marks: list[tuple[float, int, int]] = []

    def came(self, index: int, tokens: int, iterations: int, now: float) -> None:
        """Take note of a piece of a text that came after so many iterations."""
        counts, load = self._counts, self._load
        counts[index] += tokens
        if min(counts) > _SETTLED and (load.drains or max(counts) < load.new_tokens - _SETTLED):
            self._require(bool(self._marks) or all(n < load.new_tokens_of(i) for i, n in enumerate(counts)))
            self._first.setdefault(index, (now, counts[index]))
            self._last[index] = (now, counts[index])
            self._marks.append((now, sum(counts), iterations))

    def tokens_per_second(self) -> float:
        """Of all requests together."""
        self._require(len(self._marks) > 1)
        if self._load.drains:
            (start, before, _), (end, after, _) = self._marks[0], self._marks[-1]
            return (after - before) / (end - start)
        self._require(all(self._last.get(i, (0.0,)) > self._first.get(i, (0.0,)) for i in range(len(self._counts))))
        spans = ((self._first[i], self._last[i]) for i in range(len(self._counts)))
        return sum((after - before) / (end - start) for (start, before), (end, after) in spans)

    def seconds_per_iteration(self) -> float:
        """Mean time of an iteration."""
        self._require(len(self._marks) > 1)
        (start, _, first), (end, _, last) = self._marks[0], self._marks[-1]
        return (end - start) / max(1, last - first)

    def _require(self, long_enough: bool) -> None:
        if not long_enough:
            raise TooShortError(
                f"No time at which all {len(self._counts)} requests decode: give more than {self._load.new_tokens} new "
                "tokens."
            )


_PREFILL_CHUNK = 8192
"""Prompts are outside the clock; in large chunks all are read before the first request ends."""


def sparsespec(model: PreTrainedModel, load: Load, settings: Mapping[str, Any]) -> Measured:
    """This project, with `SpecConfig` fields as settings; draft_tokens = 0 is plain decoding in the same engine."""
    config = {"max_requests": len(load.prompts), "prefill_chunk": _PREFILL_CHUNK, **settings}
    fast = ss.optimize(model, ss.SpecConfig(**config))
    sampling = [
        ss.SamplingParams(
            max_new_tokens=load.new_tokens_of(i), temperature=load.temperature, seed=load.seed + i, stop_token_ids=()
        )
        for i in range(len(load.prompts))
    ]
    _warm_up(fast, load, sampling)
    clock = Clock(load)
    texts: list[list[int]] = [[] for _ in load.prompts]
    for piece in fast.stream(load.prompts, sampling):
        texts[piece.index] += piece.token_ids
        clock.came(piece.index, len(piece.token_ids), fast.stats.iterations, time.perf_counter())
    stats = fast.stats
    speed, seconds = clock.tokens_per_second(), clock.seconds_per_iteration()
    idle = _idle_while_decoding(fast, load, sampling) if model.device.type == "cuda" else None
    fast.release()  # other engines of the same process need the memory
    return Measured(
        tokens_per_second=speed,
        ms_per_iteration=1e3 * seconds,
        accepted_per_cycle=stats.accepted_per_cycle if stats.cycles else None,
        tokens_per_iteration=speed * seconds,
        kv_bytes_share=stats.kv_bytes_share,
        gpu_idle_share=idle,
        texts=texts,
    )


def _warm_up(fast: ss.OptimizedModel, load: Load, sampling: list[ss.SamplingParams]) -> None:
    """Short prompts through the same state: everything compiled, and the steps of decoding captured."""
    with fast.stream([prompt[:64] for prompt in load.prompts], sampling) as pieces:
        for _ in pieces:
            pass


def _idle_while_decoding(fast: ss.OptimizedModel, load: Load, sampling: list[ss.SamplingParams]) -> float | None:
    """From a trace of 30 iterations at short length: gaps between steps do not depend on it, steps only get longer."""
    with fast.stream([prompt[:512] for prompt in load.prompts], sampling) as pieces:
        advance(pieces, fast, 30)
        try:
            return idle_share(gpu_events(lambda: advance(pieces, fast, 30)))
        except NoTraceError as error:
            print(f"gpu_idle_share is left open: {error}")
            return None


class _StepTimes(BaseStreamer):
    """Notes when `generate` hands out tokens: the prompt's first, then those of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """A step's tokens."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """The texts are complete."""


def hf_generate(model: PreTrainedModel, load: Load, settings: Mapping[str, Any]) -> Measured:
    """HuggingFace's `generate` with a static cache and compiled decoding."""
    input_ids = torch.tensor(load.prompts, device=model.device)
    sampling = {"do_sample": load.temperature > 0, "eos_token_id": None, "pad_token_id": 0, "disable_compile": False}
    if load.temperature > 0:
        sampling |= {"temperature": load.temperature, "top_k": 0}

    def run() -> list[float]:
        torch.manual_seed(load.seed)
        steps = _StepTimes()
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=load.new_tokens,
            cache_implementation="static",
            streamer=steps,
            **sampling,
        )
        return steps.times

    run()  # compiles and captures
    times = run()[load.short :]
    if len(times) < 2:
        raise TooShortError(f"{load.new_tokens} new tokens leave no step to be timed. Give more.")
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    return Measured(len(load.prompts) / seconds, 1e3 * seconds, tokens_per_iteration=float(len(load.prompts)))


def hf_batch(model: PreTrainedModel, load: Load, settings: Mapping[str, Any]) -> Measured:
    """HuggingFace's continuous batching."""
    config = GenerationConfig(
        do_sample=load.temperature > 0, temperature=load.temperature or 1.0, top_k=0, eos_token_id=-1, pad_token_id=0
    )

    def run(new_tokens: int) -> None:
        torch.manual_seed(load.seed)
        model.generate_batch(inputs=load.prompts, generation_config=config, max_new_tokens=new_tokens)

    return _difference(run, load)


def vllm(model: PreTrainedModel, load: Load, settings: Mapping[str, Any]) -> Measured:
    """vLLM on the checkpoint folder `settings["checkpoint"]`; "ngram" in settings switches its n-gram drafts on."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineMissingError("vllm is not installed; install it beside this project to compare with it.")
    from vllm import LLM, SamplingParams, TokensPrompt

    drafts = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4}}
    longest = max(map(len, load.prompts)) + load.new_tokens
    engine = LLM(
        str(settings["checkpoint"]),
        max_model_len=longest,
        max_num_seqs=len(load.prompts),
        enable_prefix_caching=False,
        **(drafts if settings.get("ngram") else {}),
    )
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in load.prompts]

    def run(new_tokens: int) -> None:
        sampling = [
            SamplingParams(temperature=load.temperature, seed=load.seed + i, max_tokens=new_tokens, ignore_eos=True)
            for i in range(len(prompts))
        ]
        engine.generate(prompts, sampling, use_tqdm=False)

    return _difference(run, load)


ENGINES: Mapping[str, Runner] = {
    "sparsespec": sparsespec,
    "plain": lambda model, load, settings: sparsespec(model, load, {**settings, "draft_tokens": 0}),
    "hf-generate": hf_generate,
    "hf-batch": hf_batch,
    "vllm": vllm,
}


def versions(engine: str) -> dict[str, str]:
    """Versions of what an engine runs on."""
    names = ["torch", "triton", "transformers", *(["vllm"] if engine == "vllm" else [])]
    return {name: version(name) for name in names}


def release_memory() -> None:
    """Give back what a finished engine held."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def checkpoint_exists(folder: Path | None) -> bool:
    """Whether `folder` holds a checkpoint that another engine can load."""
    return folder is not None and (folder / "config.json").exists()


def _difference(run: Callable[[int], None], load: Load) -> Measured:
    """Tokens a second of the new tokens that a long run has and a short one has not."""
    for new_tokens in (load.short, load.new_tokens):
        run(new_tokens)  # compiles and captures
    seconds = []
    for new_tokens in (load.short, load.new_tokens):
        start = time.perf_counter()
        run(new_tokens)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    steps = load.new_tokens - load.short
    taken = seconds[1] - seconds[0]
    if taken < _LEAST_DIFFERENCE * seconds[0]:
        raise TooShortError(
            f"{load.new_tokens} new tokens took {seconds[1]:.2f} s and {load.short} of them {seconds[0]:.2f} s: too "
            "close to tell what a token takes. Give more new tokens."
        )
    return Measured(
        tokens_per_second=len(load.prompts) * steps / taken,
        ms_per_iteration=1e3 * taken / steps,
        tokens_per_iteration=float(len(load.prompts)),
    )
