"""Other engines in the throughput benchmark, each behind one function that times decoding and leaves out the prompts.

HuggingFace's `generate` is watched step by step. Other engines are black boxes: they run twice, for `short` and for all
new tokens, and what the longer run takes beyond the shorter one is decoding alone. Whatever is timed has run before,
with the same lengths. Each engine runs with what its own documentation recommends for throughput, where its defaults
are meant for something else.
"""

import gc
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from decoding_clock import TooShortError
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
from workloads import Load, Measured

import sparsespec_compile as ss


class EngineMissingError(ss.SparseSpecError, ImportError):
    """An optional engine is not installed."""


class PeerFailedError(ss.SparseSpecError, RuntimeError):
    """Another engine did not write the texts that it was asked for."""


_LEAST_DIFFERENCE = 0.05
"""By which a black box's longer run must exceed its shorter one for the difference to be more than noise."""


Runner = Callable[[PreTrainedModel, Load, Mapping[str, Any]], Measured]


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


def hf_batch_settings(device: torch.device, load: Load) -> dict[str, Any]:
    """What the guide to transformers' continuous batching recommends for throughput, as far as this version has it.

    CUDA graphs, asynchronous batching, the highest compile level and a large token budget are all off, or smaller, by
    default. The decode fast path follows from the lengths and needs flash attention.
    """
    asked: dict[str, Any] = {"max_requests_per_batch": len(load.prompts)}
    if device.type == "cuda":
        asked |= {
            "max_batch_tokens": 16384,
            "use_cuda_graph": True,
            "use_async_batching": True,
            "default_compile_level": 3,
            "auto_switch_to_flash": False,  # that may download kernels; `attention` says what is taken
        }
    else:  # where nothing tells it how much memory there is
        pages = sum(-(-(len(prompt) + load.new_tokens) // 256) + 1 for prompt in load.prompts)
        asked |= {"max_batch_tokens": 256, "num_blocks": max(pages, 4)}
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    return {"attention": _attention(device), **{name: value for name, value in asked.items() if name in known}}


def _attention(device: torch.device) -> str:
    """The recommended attention that is installed: flash, else the paged form of torch's own."""
    if device.type == "cuda" and is_flash_attn_3_available():
        return "flash_attention_3"
    if device.type == "cuda" and is_flash_attn_2_available():
        return "flash_attention_2"
    return "sdpa"


def hf_batch(model: PreTrainedModel, load: Load, settings: Mapping[str, Any]) -> Measured:
    """HuggingFace's continuous batching, with `hf_batch_settings`; what it sets up is kept from run to run."""
    config = GenerationConfig(
        do_sample=load.temperature > 0, temperature=load.temperature or 1.0, top_k=0, eos_token_id=-1, pad_token_id=0
    )
    batching = ContinuousBatchingConfig(**{name: value for name, value in settings.items() if name != "attention"})
    before = model.config._attn_implementation

    def run(new_tokens: int) -> None:
        torch.manual_seed(load.seed)
        outputs = model.generate_batch(
            inputs=load.prompts,
            generation_config=config,
            continuous_batching_config=batching,
            max_new_tokens=new_tokens,
            persistent_manager=True,
        )
        whole = sum(len(output.generated_tokens) == new_tokens for output in outputs.values())
        if whole < len(load.prompts):  # it prints why, and returns what there is
            raise PeerFailedError(f"hf-batch wrote {whole} of {len(load.prompts)} texts: see what it printed.")

    try:
        model.set_attn_implementation(settings["attention"])
        run(load.new_tokens)  # the manager is sized by what it is first given
        return _difference(run, load)
    finally:
        model.destroy_cached_continuous_batching_manager()
        model.set_attn_implementation(before)


def vllm_settings(ngram: bool) -> dict[str, Any]:
    """What vLLM's guides recommend for offline throughput, as far as this version has it.

    CUDA graphs and prefix caching are as by default, on. Asynchronous scheduling goes with plain decoding alone.
    """
    from vllm import EngineArgs

    asked: dict[str, Any] = {"max_num_batched_tokens": 16384, "enforce_eager": False}
    if ngram:
        asked["speculative_config"] = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4}
    else:
        asked["async_scheduling"] = True
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        # Of all memory, in which the model that other engines are measured with may be.
        asked["gpu_memory_utilization"] = round(min(0.95, 0.97 * free / total), 3)
    known = {field.name for field in fields(EngineArgs)}
    return {name: value for name, value in asked.items() if name in known}


def vllm(model: PreTrainedModel, load: Load, settings: Mapping[str, Any]) -> Measured:
    """vLLM on the checkpoint folder `settings["checkpoint"]`; "ngram" in settings switches its n-gram drafts on."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineMissingError("vllm is not installed; install it beside this project to compare with it.")
    from vllm import LLM, SamplingParams, TokensPrompt

    longest = max(map(len, load.prompts)) + load.new_tokens
    engine = LLM(
        str(settings["checkpoint"]),
        max_model_len=longest,
        max_num_seqs=len(load.prompts),
        **vllm_settings(bool(settings.get("ngram"))),
    )
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in load.prompts]

    def run(new_tokens: int) -> None:
        sampling = [
            SamplingParams(temperature=load.temperature, seed=load.seed + i, max_tokens=new_tokens, ignore_eos=True)
            for i in range(len(prompts))
        ]
        engine.generate(prompts, sampling, use_tqdm=False)

    return _difference(run, load)


PEERS: Mapping[str, Runner] = {"hf-generate": hf_generate, "hf-batch": hf_batch, "vllm": vllm}


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
