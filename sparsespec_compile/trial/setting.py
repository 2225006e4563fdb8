"""The engines that an audit or a benchmark sets beside a model's own, over the same compiled graph."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import GenerationConfig

from sparsespec_compile.api import OptimizedModel
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import ConfigError, PromptError, RequestFailedError
from sparsespec_compile.requests.generation_config import token_ids
from sparsespec_compile.requests.prompts import Prompt, token_list
from sparsespec_compile.requests.sampling_params import SamplingParams
from sparsespec_compile.requests.stop_strings import Decoder
from sparsespec_compile.runtime.build import Target
from sparsespec_compile.runtime.device.step import as_it_is
from sparsespec_compile.runtime.host.engine import Engine
from sparsespec_compile.runtime.host.request import FinishReason
from sparsespec_compile.runtime.host.stats import Stats

_NOTHING = GenerationConfig()
"""For the engine: what the model's own `generation_config` asks for is not part of a trial."""


@dataclass(frozen=True)
class Asked:
    """A text to be written.

    Attributes:
        prompt: its number.
        tokens: of the prompt.
        temperature: 0.0 = greedy.
        seed: of the text.
    """

    prompt: int
    tokens: list[int]
    temperature: float
    seed: int


@dataclass(frozen=True)
class Written:
    """Texts, and what it took to write them.

    Attributes:
        texts: the new tokens of each text that was asked for.
        stats: of the engine; None = another one wrote them.
    """

    texts: list[list[int]]
    stats: Stats | None = None


def read_prompts(fast: OptimizedModel, prompts: Sequence[Prompt], tokenizer: Decoder | None) -> list[list[int]]:
    """The tokens of prompts.

    Raises:
        PromptError: there are none, or one cannot be read.
        ConfigError: ranks share the model.
    """
    if fast._engine.target.ranks is not None:
        raise ConfigError(
            "Ranks share the model, and a trial of it needs a whole one, which other engines run as well. Try the "
            "model on one device, with tensor_parallel=1, or a smaller one of the same kind."
        )
    if isinstance(prompts, str | torch.Tensor) or not isinstance(prompts, Sequence) or len(prompts) == 0:
        raise PromptError(f"Give a list of prompts, at least one, got {prompts!r:.80}.")
    vocabulary = int(fast.config.get_text_config().vocab_size)
    return [token_list(index, prompt, vocabulary, tokenizer) for index, prompt in enumerate(prompts)]


def stop_tokens(fast: OptimizedModel) -> tuple[int, ...]:
    """The model's own end-of-sequence tokens."""
    return tuple(token_ids("eos_token_id", getattr(fast.generation_config, "eos_token_id", None)))


def write(fast: OptimizedModel, asked: Sequence[Asked], max_new_tokens: int, bar: tqdm) -> Written:
    """Let an engine write texts; `bar` counts them.

    Raises:
        RequestFailedError: one could not be completed.
    """
    stops = stop_tokens(fast)
    sampling = [
        SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=one.temperature,
            seed=one.seed,
            stop_token_ids=stops,
            stop_strings=(),
        )
        for one in asked
    ]
    texts: list[list[int]] = [[] for _ in asked]
    with fast.stream([one.tokens for one in asked], sampling, generation_config=_NOTHING) as stream:
        for piece in stream:
            completion = piece.completion
            if completion is None:
                continue
            if completion.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                raise RequestFailedError(
                    f"A text of prompt {asked[piece.index].prompt} ended with {completion.finish_reason.name}"
                    f"{'' if completion.error is None else f' ({completion.error})'}. Give the engine more memory, or "
                    "fewer or shorter texts."
                ) from completion.error
            texts[piece.index] = completion.token_ids
            bar.update()
        if stream.unfinished:
            raise RequestFailedError(f"stop() ended {stream.unfinished} texts before they were whole.")
    return Written(texts, fast.stats)


@contextmanager
def plain(fast: OptimizedModel) -> Iterator[OptimizedModel]:
    """Plain decoding by the same compiled graph."""
    config = replace(fast.spec_config, draft_tokens=0, drafter="auto", draft_weights="exact")
    with _beside(fast, config, replace(fast._engine.target, drafts=None)) as other:
        yield other


@contextmanager
def drafting(fast: OptimizedModel, drafter: str) -> Iterator[OptimizedModel]:
    """Cycles of as many drafts as "auto" may choose, of one drafter."""
    settings: dict[str, Any] = {"draft_tokens": fast.spec_config.max_draft_tokens, "drafter": drafter}
    target = fast._engine.target
    if drafter == "ngram":  # no iteration drafts
        target = replace(target, drafts=None)
    with _beside(fast, replace(fast.spec_config, **settings), target) as other:
        yield other


@contextmanager
def uncompiled(fast: OptimizedModel) -> Iterator[OptimizedModel]:
    """The same settings, with the graph called op by op and nothing captured."""
    compiled, target = fast._compiled, fast._engine.target
    drafts = target.drafts
    if drafts is not None and compiled.draft is not None:
        drafts = replace(drafts, forward=compiled.draft.graph_module)
    target = replace(target, forward=compiled.graph_module, compiler=as_it_is, drafts=drafts)
    with _beside(fast, replace(fast.spec_config, cuda_graphs=False, backend="eager"), target) as other:
        yield other


@contextmanager
def _beside(fast: OptimizedModel, config: SpecConfig, target: Target) -> Iterator[OptimizedModel]:
    """The compiled model with an engine of its own, in the memory that the model's own gives back; so does it."""
    fast.release()
    other = object.__new__(OptimizedModel)
    vars(other).update(vars(fast))
    other.spec_config, other._engine = config, Engine(target, config)
    try:
        yield other
    finally:
        other.stop()
        other.release()


def _triton_version() -> str | None:
    """None where there is none: an engine on a CPU does without."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def environment(fast: OptimizedModel) -> dict[str, Any]:
    """Model, device, versions and settings, for the head of a report."""
    device = fast.device
    return {
        "model": fast.name_or_path or type(fast.model).__name__,
        "parameters": sum(parameter.numel() for parameter in fast.model.parameters()),
        "dtype": str(fast.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "transformers": transformers.__version__,
        "settings": asdict(fast.spec_config),
        "draft_weights": fast.report.draft_weights,
    }
