"""`optimize`: a HuggingFace causal LM in, a model with the same texts and fewer bytes read out."""

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

import sparsespec_compile.kernels  # noqa: F401  registers the ops
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import ConfigError, ContextLengthError, CopyError, SamplingError, UnsupportedModelError
from sparsespec_compile.generation import resolve_generation
from sparsespec_compile.passes.compile_regions import CompiledForward
from sparsespec_compile.passes.pipeline import CompiledModel, compile_model
from sparsespec_compile.passes.report import CompileReport
from sparsespec_compile.prompts import pad, shape_of, unpad
from sparsespec_compile.runtime.engine import Engine, Target
from sparsespec_compile.runtime.request import Request
from sparsespec_compile.runtime.sampling import sample
from sparsespec_compile.runtime.stats import Stats

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


def optimize(model: PreTrainedModel, config: SpecConfig | None = None) -> "OptimizedModel":
    """Compile a HuggingFace causal LM for lossless sparse self-speculative decoding.

    The model is captured once, its attention is replaced, and projections that share an input are fused. The compiled
    graph works on the model's own parameters: they are not copied, and changing them in place changes both.

    Args:
        model: a decoder-only `PreTrainedModel` on one device, in the dtype it shall run in.
        config: settings; None = `SpecConfig()`.

    Returns:
        An object with `generate`, `stats` and `report`.

    Raises:
        UnsupportedModelError: the model cannot be rewritten with the same text; the text says why and what to do.
        ConfigError: `config` is not a `SpecConfig`.

    Example:
        >>> fast = optimize(model)
        >>> out = fast.generate(input_ids, attention_mask=mask, max_new_tokens=512)
        >>> print(fast.stats)
    """
    config = SpecConfig() if config is None else config
    if not isinstance(config, SpecConfig):
        raise ConfigError(f"config must be a SpecConfig(name=value, ...), got {type(config).__name__}.")
    return OptimizedModel(model, config)


class OptimizedModel:
    """A compiled model. Build it with `optimize`.

    Attributes:
        model: the HuggingFace model, unchanged; its parameters are the ones in use.
        config: the settings.
        report: what the compiler did: passes, attention sites, fused projections.
    """

    def __init__(self, model: PreTrainedModel, config: SpecConfig) -> None:
        self.model = model
        self.config = config
        self._compiled: CompiledModel = compile_model(model, page_size=config.page_size)
        device = _device(model)
        self.report: CompileReport = self._compiled.report
        inductor = config.backend == "inductor" or (config.backend == "auto" and device.type == "cuda")
        self._engine = Engine(
            Target(
                forward=_compile_regions(self._compiled) if inductor else self._compiled.graph_module,
                layout=self._compiled.layout,
                dtype=model.dtype,
                device=device,
                sampler=torch.compile(sample, dynamic=True) if inductor else sample,
            ),
            config,
        )

    @property
    def stats(self) -> Stats:
        """What speculation achieved in the latest `generate`."""
        return self._engine.stats

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        streamer: "BaseStreamer | None" = None,
        **arguments: Any,
    ) -> Tensor:
        """Continue prompts; the text is the one that decoding token by token gives.

        Args:
            input_ids: int64 [batch, width] on the model's device, padded on the left.
            attention_mask: [batch, width], 0 = padding; None = the padding token is padding, as in HuggingFace.
            generation_config: overrides the model's own.
            seed: for sampling. One integer for the batch, from which each request's own seed is derived; a sequence
                with each request's own, which reproduces its text in any batch; None draws one from torch's generator.
            streamer: told of a single prompt's tokens as they become final, as in HuggingFace.
            **arguments: fields of `GenerationConfig`: max_new_tokens, max_length, do_sample, temperature, top_k, top_p,
                min_p, eos_token_id, pad_token_id, with HuggingFace's meaning and defaults (top_k is 50 unless given).
                temperature, top_k, top_p and min_p may be sequences with a value for each request. Fields that would
                change the text in other ways are refused unless they are switched off.

        Returns:
            int64 [batch, width + longest new text], each row its prompt, its new tokens with the stop token, padding.

        Raises:
            PromptError: prompts of a wrong type, shape, device, padding or vocabulary, or empty.
            SamplingError: unknown, unsupported or impossible arguments.
            ContextLengthError: prompt and new tokens exceed the model's positions.
            PoolTooSmallError: a request does not fit the KV pool.
            StaleParametersError: the model was moved or its parameters were replaced since `optimize`.
        """
        self._compiled.require_shared_parameters()
        vocabulary = self.model.config.get_text_config().vocab_size
        batch, width = shape_of(input_ids)
        generation = resolve_generation(
            self.model.generation_config, generation_config, arguments, batch=batch, prompt_width=width, seed=seed
        )
        device = self._engine.target.device
        prompts = unpad(input_ids, attention_mask, generation.prompt_padding, device, vocabulary)
        requests = [
            Request(prompt, generation.max_new_tokens, params, generation.stop_tokens)
            for prompt, params in zip(prompts, generation.params, strict=True)
        ]
        self._check_context(requests)
        self._run(requests, input_ids, streamer)
        return pad(input_ids, [request.output for request in requests], generation.pad_token)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise CopyError(
            "A compiled model cannot be copied or pickled: its graph works on the parameters of this very model. Copy "
            "or save the model and call optimize on the copy."
        )

    def _run(self, requests: list[Request], input_ids: Tensor, streamer: "BaseStreamer | None") -> None:
        if streamer is not None:
            if len(requests) != 1:
                raise SamplingError(f"A streamer follows one prompt, got {len(requests)}: generate one by one.")
            streamer.put(input_ids.cpu())
        with closing(self._engine.run(requests)) as results:
            for _, tokens in results:
                if streamer is not None:
                    streamer.put(torch.tensor(tokens))
        if streamer is not None:
            streamer.end()

    def _check_context(self, requests: list[Request]) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(request.max_length for request in requests)
        if limit is not None and longest > limit:
            raise ContextLengthError(
                f"Prompt and max_new_tokens need {longest} positions, the model has {limit} "
                "(config.max_position_embeddings). Lower max_new_tokens or shorten the prompt."
            )


def _compile_regions(compiled: CompiledModel) -> CompiledForward:
    with tqdm(desc="compiling", unit=" regions", leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return compiled.compile_regions(on_compiled=show)


def _device(model: PreTrainedModel) -> torch.device:
    if model.device.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(f"The model is on {model.device}; kernels exist for CPU and CUDA. Move it there.")
    return model.device
