"""`optimize`: a HuggingFace causal LM in, a model with the same texts and fewer bytes read out."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NoReturn

import rich
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

import sparsespec_compile.kernels  # noqa: F401  registers the ops
from sparsespec_compile.advice.ceilings import Ceilings
from sparsespec_compile.advice.explain import Explanation, explain
from sparsespec_compile.advice.prediction import draft_cost
from sparsespec_compile.compile.forms import Form, Forms
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import (
    ConfigError,
    CopyError,
    PoolTooSmallError,
    PromptError,
    RequestFailedError,
    SamplingError,
    StaleParametersError,
    StoppedError,
    UnsupportedModelError,
)
from sparsespec_compile.passes.capture.adapters import inner_model
from sparsespec_compile.passes.capture.positions import has_position_table
from sparsespec_compile.passes.capture.rotary import positions_of, steady_positions
from sparsespec_compile.passes.cost.graph import graph_cost
from sparsespec_compile.passes.report import CompileReport
from sparsespec_compile.requests.prompts import Prompt, pad
from sparsespec_compile.requests.reader import RequestReader, Sampling, generate_output
from sparsespec_compile.requests.sampling_params import Completion
from sparsespec_compile.requests.stop_strings import Decoder
from sparsespec_compile.runtime.build import MemoryPlan
from sparsespec_compile.runtime.device.captured_step import CapturedStep
from sparsespec_compile.runtime.host.request import FinishReason, Request
from sparsespec_compile.runtime.host.stats import Stats
from sparsespec_compile.stream import TokenStream

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


def optimize(model: PreTrainedModel, config: SpecConfig | None = None) -> "OptimizedModel":
    """Compile a HuggingFace causal LM for lossless sparse self-speculative decoding.

    The model is captured once, its attention is replaced, and projections that share an input are fused. The compiled
    graph works on the model's own parameters: they are not copied, and changing them in place changes both.

    Thread safety: any thread may call. Other threads may use the model during the compilation; compilations of a
    process run one after the other.

    Adapters that PEFT has put into the model's layers are a part of it, merged or not. When they are merged, unmerged,
    switched, switched off, added or deleted, the next generation compiles the model anew, or takes the graph that was
    compiled for that state before.

    Args:
        model: a decoder-only `PreTrainedModel` on one device, in the dtype it shall run in, or a PEFT model around one.
        config: settings; None = `SpecConfig()`.

    Returns:
        What generates: see `OptimizedModel`.

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
    model = inner_model(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"optimize takes a loaded transformers model, got {type(model).__name__}. {_way_to_a_model(model)}"
        )
    return OptimizedModel(model, config)


class OptimizedModel:
    """A compiled model. Build it with `optimize`.

    It has what transformers' pipelines and other callers of `generate` read of a model (`config`, `generation_config`,
    `device`, `dtype`, `can_generate()` and so on), so it can take the model's place there:
    `pipeline("text-generation", model=fast, tokenizer=tokenizer)`. The pipeline logs that it does not know the class.

    Thread safety: every method and property may be used from any thread. Requests of several threads share batches, and
    none changes another's text. One thread at a time runs iterations; a call that needs to change what is running waits
    for the end of the present one.

    Streams: on CUDA, iterations run on a stream of the engine's own. It waits for the stream that is current where
    requests are submitted, so changes of parameters enqueued there are seen. The stream that is current where a
    generation ends waits for the engine's, so parameters may be changed there at once. Only `capture` gives steps that
    run on the caller's stream.

    State: KV pool, scores, page tables and captured steps are allocated for the first request and kept for later ones,
    until `release` or until this object is collected. Compiled code is kept as long as this object.

    Attributes:
        model: the HuggingFace model, unchanged; its parameters are the ones in use.
        spec_config: the settings of `optimize`.
        report: what the compiler did: passes, attention sites, fused projections.
    """

    main_input_name = "input_ids"
    input_modalities = ("text",)
    output_modalities = ("text",)

    def __init__(self, model: PreTrainedModel, config: SpecConfig) -> None:
        self.model = model
        self.spec_config = config
        self._forms = Forms(model, config)
        self._take(self._forms.first)

    def _take(self, form: Form) -> None:
        self._compiled, self._engine = form
        self._positions_end = has_position_table(self._compiled.graph_module)
        self.report: CompileReport = self._compiled.report

    def _follow(self) -> None:
        """Take the graph for the adapters as they are now; refuse whatever else has changed about the model."""
        try:
            self._compiled.record.require()
        except StaleParametersError:
            with self._forms.lock:
                form = self._forms.follow(Form(self._compiled, self._engine))
                if form is not None:
                    self._take(form)

    @property
    def config(self) -> PreTrainedConfig:
        """The HuggingFace model's own configuration. That of `optimize` is `spec_config`."""
        return self.model.config

    @property
    def generation_config(self) -> GenerationConfig:
        """The HuggingFace model's own generation settings; changes take effect with the next call."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.model.generation_config = value

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.model.dtype

    @property
    def name_or_path(self) -> str:
        """Where the HuggingFace model was loaded from; empty if it was not."""
        return self.model.name_or_path or ""

    def can_generate(self) -> bool:
        """True."""
        return True

    def __call__(self, *args: Any, **arguments: Any) -> Any:
        """The HuggingFace model's own forward pass, uncompiled: for the logits of whole texts."""
        return self.model(*args, **arguments)

    def eval(self) -> "OptimizedModel":
        """Put the HuggingFace model in evaluation mode; returns self. The compiled graph always is in it."""
        self.model.eval()
        return self

    def to(self, device: torch.device | str | int) -> "OptimizedModel":
        """Return self if the model is on `device`: for callers that place every model.

        Raises:
            StaleParametersError: it is on another one. Parameters in use cannot move.
        """
        wanted = torch.empty(0, device=device).device
        if wanted != self.device:
            raise StaleParametersError(
                f"A compiled model stays on its device, {self.device}, got to({device!r}). Move the HuggingFace model "
                "first and call optimize on it."
            )
        return self

    @property
    def stats(self) -> Stats:
        """What speculation achieved in the latest generation, the one under way included.

        The next generation begins new counts; the object returned here keeps those of this one.
        """
        return self._engine.stats

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        streamer: "BaseStreamer | None" = None,
        tokenizer: Decoder | None = None,
        **arguments: Any,
    ) -> Any:
        """Continue prompts; the text is the one that decoding token by token gives.

        Args:
            input_ids: int64 or int32 [batch, width] on the model's device, padded on the left; None = one prompt that
                is bos_token_id, as in HuggingFace.
            attention_mask: [batch, width], 0 = padding; None = the padding token is padding, as in HuggingFace.
            generation_config: overrides the model's own.
            inputs: HuggingFace's other name for `input_ids`.
            seed: for sampling. One integer is the seed of the batch, from which each row's own is derived: equal
                prompts get different texts. (`SamplingParams.seed` is the seed of a text instead.) A sequence holds the
                seed of each row's text, which reproduces it in any batch; None draws one from torch's generator.
            streamer: told of a single prompt's tokens as they become final, as in HuggingFace.
            tokenizer: decodes tokens for stop_strings.
            **arguments: fields of `GenerationConfig`: max_new_tokens, max_length, do_sample, temperature, top_k, top_p,
                min_p, num_return_sequences, eos_token_id, pad_token_id, bos_token_id, stop_strings, with HuggingFace's
                meaning and defaults (top_k is 50 unless given). temperature, top_k, top_p and min_p may be sequences
                with a value for each prompt. Penalties, biases, suppressed and forced tokens, least lengths and
                transformers' other filters are those of `SamplingParams`, and so are `logits_processor` and
                `prefix_allowed_tokens_fn`. They see each prompt without its padding. Fields that would change the text
                in other ways are refused unless they are switched off, and so are the other arguments of HuggingFace's
                `generate` (stopping_criteria, assistant_model and so on) unless they are None, False or empty.

        Returns:
            int64 [batch * num_return_sequences, width + longest new text], each row its prompt, its new tokens with the
            stop token, padding. The texts of a prompt stand beside each other. With return_dict_in_generate=True
            HuggingFace's `GenerateDecoderOnlyOutput`: these as `sequences`, and, where output_logits or output_scores
            ask for them, `logits` (the model's own) or `scores` (after processing, temperature and filters): for each
            new token float32 [rows, vocabulary], zeros behind the end of a text.

        Raises:
            PromptError: prompts of a wrong type, shape, device, padding or vocabulary, or empty.
            SamplingError: unknown, unsupported or impossible arguments.
            ContextLengthError: prompt and new tokens exceed the positions that the model can compute.
            PoolTooSmallError: a request does not fit the KV pool.
            EngineFailedError: an iteration shared with another thread's call failed there.
            StaleParametersError: the model is no longer the one that was compiled; the text says what has changed.
            TrainingModeError: the model is in training mode, in which it drops values at random.
            StoppedError: `stop` was called meanwhile.

        Warns:
            ContextLengthWarning: prompt and new tokens may exceed the positions that a rotary model is made for.

        Calls from several threads are served together, in shared batches; none changes another's text.
        """
        self._follow()
        if input_ids is not None and inputs is not None:
            raise PromptError("generate got both input_ids and inputs, which name the same: pass one of them.")
        batch = self._reader(tokenizer).read_padded(
            inputs if input_ids is None else input_ids, attention_mask, generation_config, arguments, seed
        )
        self._run(batch.requests, batch.input_ids, streamer)
        _require_complete(batch.requests)
        sequences = pad(batch.input_ids, [request.output for request in batch.requests], batch.pad_token)
        return sequences if batch.output is None else generate_output(sequences, batch)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = None,
        *,
        tokenizer: Decoder | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Continue many prompts of any lengths; further ones start as earlier ones end.

        At most `SpecConfig.max_requests` texts are decoded together, fewer where their KV does not fit the pool. The
        number of prompts costs host memory alone.

        Args:
            prompts: each a text, a list of chat messages, or token ids: a list, a NumPy array or a tensor of integers.
            sampling: for all prompts, or one for each. `SamplingParams` say everything about drawing, length and number
                of texts; None = the model's `generation_config` does, as in `generate`, with 512 new tokens where it
                names no length. What else `generation_config` asks for (repetition_penalty) is refused by name.
            tokenizer: encodes texts and chats, the latter by its chat template, and decodes `Completion.text` and
                tokens for stop strings. Not needed for token ids.
            progress: whether to show texts done, time left, tokens a second, accepted drafts, the present choice of
                drafts, requests and memory: in a terminal or a notebook five times a second, in a log every 30 seconds.

        Returns:
            The texts, `SamplingParams.n` for each prompt, in the order of the prompts.

        Raises:
            As `generate`; a text that memory cannot hold any longer ends with `FinishReason.MEMORY` instead, and one
            whose own tokenizer fails with `FinishReason.ERROR` and `Completion.error`.
        """
        stream = self.stream(prompts, sampling, tokenizer=tokenizer, progress=progress)
        completions = list(_completions(stream))
        _require_all(stream.unfinished, len(completions) + stream.unfinished)
        return sorted(completions, key=lambda completion: (completion.index, completion.sample))

    def as_completed(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = None,
        *,
        tokenizer: Decoder | None = None,
        progress: bool = False,
    ) -> Iterator[Completion]:
        """`generate_batch`, each text as soon as it is complete; after `stop` there are no more.

        The thread that iterates runs the model: between two `next` nothing comes forward, unless other threads
        generate. Dropping the iterator ends what is unfinished.
        """
        return _completions(self.stream(prompts, sampling, tokenizer=tokenizer, progress=progress))

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = None,
        *,
        tokenizer: Decoder | None = None,
        progress: bool = False,
        background: bool = False,
        open_ended: bool = False,
        generation_config: GenerationConfig | None = None,
    ) -> TokenStream:
        """`generate_batch`, tokens as they become final.

        The iterator can `add` prompts and `cancel` a prompt's texts, from any thread; closing it ends all of them.
        Tokens that nobody takes wait in host memory until the stream is closed.

        Args:
            background: whether a thread of the stream's own runs the model, so that texts come forward while nobody
                waits for a piece.
            open_ended: whether the iterator waits for further prompts, until it is closed, instead of ending with the
                last text. `prompts` may be empty then.
            generation_config: in place of the model's own, which is not looked at then. The others as in
                `generate_batch`.

        Raises:
            As `generate_batch`.
        """
        if background and self._compiled.ranks is not None:
            raise ConfigError(
                "background=True lets texts come forward at any time, and ranks that share a model must make the same "
                "calls in the same iterations. Iterate over the stream on all ranks instead."
            )
        self._follow()
        stream = TokenStream(
            self._engine,
            self._reader(tokenizer, generation_config),
            self._compiled.record.require,
            progress=progress,
            background=background,
            open_ended=open_ended,
        )
        stream.add(prompts, sampling)
        return stream

    def stop(self) -> None:
        """End what this model is generating, if anything, in all threads; callable from any.

        A stream then gives out no more; `generate` and `generate_batch`, which owe whole texts, raise `StoppedError`.
        """
        self._engine.stop()

    def release(self) -> None:
        """Give the memory of KV pool, scores and captured steps back. Compiled code is kept.

        The next generation allocates them anew, sized by the memory that is free then. Prefixes that were kept in the
        pool are lost. Steps from `capture` keep their own memory until they are dropped. It may be called from any
        thread, and waits for steps under way.

        Raises:
            EngineBusyError: a generation or a stream is unfinished.
        """
        self._engine.release()

    def capture(self, max_requests: int, max_length: int) -> CapturedStep:
        """A step to fill and replay in a loop of your own; `examples/custom_loop.py` is one.

        It has a state of its own beside the engine's, and runs on the stream that is current where it is filled and
        replayed; it is not for several threads at once.

        Args:
            max_requests: request slots, at least 1.
            max_length: tokens of a text, prompt included. The pool has room for `max_requests` texts of this length.

        Raises:
            ConfigError: sizes below 1.
            ContextLengthError: `max_length` exceeds the model's positions.
            MemoryPlanError, PoolTooSmallError: the sizes do not fit the device.
            StaleParametersError: the model is no longer the one that was compiled; the text says what has changed.
            TrainingModeError: the model is in training mode, in which it drops values at random.
        """
        self._follow()
        _require_counts(max_requests=max_requests, max_length=max_length)
        reader = self._reader()
        reader.check_length(max_length)
        return self._engine.capture(max_requests, max_length, reader.vocabulary)

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """What the latest state on the device takes; None before the first one. Print it with rich."""
        return self._engine.memory_plan

    def _reader(
        self, tokenizer: Decoder | None = None, generation_config: GenerationConfig | None = None
    ) -> RequestReader:
        positions = positions_of(self.model)
        return RequestReader(
            int(self.model.config.get_text_config().vocab_size),
            self._engine.target.device,
            positions,
            positions if self._positions_end else None,
            self.model.generation_config if generation_config is None else generation_config,
            tokenizer,
            changes=steady_positions(self.model) is not None,
        )

    def explain(
        self, lengths: int | Sequence[int], batch: int, device: torch.device | str | Ceilings | None = None
    ) -> Explanation:
        """Print and return what a mean iteration costs. In a notebook it is returned alone: the cell shows its value.

        Args:
            lengths: cached length of the requests, or a sample of their lengths, of which the mean counts.
            batch: requests decoded together.
            device: a CUDA device, the name of a known one ("H200"), or its `Ceilings`; None = the model's device.

        Raises:
            CostModelError: the model's cost is not known.
            CeilingsError: the device is unknown.
            AdviceError: impossible lengths or batch.
            ContextLengthError: the model cannot compute texts of such lengths.

        Warns:
            ContextLengthWarning: it is rotary, and not made for them.
        """
        cost = graph_cost(self._compiled.graph_module)
        device = self._engine.target.device if device is None else device
        draft, run = self._compiled.draft, self._engine.drafts
        drafts = None
        if draft is not None and run is not None:
            drafts = draft_cost(graph_cost(draft.graph_module), run.copies.kind)
        explanation = explain(cost, self.spec_config, lengths, batch, device, drafts)
        self._reader().check_length(max(lengths) if isinstance(lengths, Sequence) else lengths)
        if not rich.get_console().is_jupyter:
            rich.print(explanation)
        return explanation

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise CopyError(
            "A compiled model cannot be copied or pickled: its graph works on the parameters of this very model. Copy "
            "or save the model and call optimize on the copy."
        )

    def _run(self, requests: list[Request], input_ids: Tensor, streamer: "BaseStreamer | None") -> None:
        if streamer is not None:
            if len(requests) != 1:
                raise SamplingError(f"A streamer follows one prompt, got {len(requests)}: generate one by one.")
            if not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
                raise SamplingError(
                    f"streamer must have put(tokens) and end(), as transformers' do, got {type(streamer).__name__}."
                )
            streamer.put(input_ids.cpu())
        with closing(self._engine.run(requests)) as outputs:
            for output in outputs:
                if streamer is not None:
                    streamer.put(torch.tensor(output.tokens, dtype=torch.int64, device="cpu"))
        if streamer is not None:
            streamer.end()


def _way_to_a_model(given: Any) -> str:
    """What to pass instead of something that is no transformers model, such as one that wraps it."""
    if callable(getattr(given, "merge_and_unload", None)):  # PEFT's
        return (
            "It wraps a model in adapters: pass model.merge_and_unload(), which holds them in its weights, or "
            "model.get_base_model(), which applies them in every layer."
        )
    for name in ("_orig_mod", "module", "model"):  # torch.compile's, DistributedDataParallel's, a pipeline's or ours
        if isinstance(getattr(given, name, None), torch.nn.Module):
            return f"It wraps a model: pass its .{name}."
    return "Load it first: AutoModelForCausalLM.from_pretrained(folder_or_hub_id, dtype=...)."


def _completions(stream: TokenStream) -> Iterator[Completion]:
    """The texts of a stream, which ends with this iterator, exhausted or dropped."""
    with stream:
        for piece in stream:
            if piece.completion is not None:
                yield piece.completion


def _require_counts(**values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}.")


def _require_all(unfinished: int, texts: int) -> None:
    if unfinished:
        raise StoppedError(
            f"stop() ended {unfinished} of {texts} texts before they were whole. Use stream() or as_completed() to "
            "keep what there is."
        )


def _require_complete(requests: list[Request]) -> None:
    """`generate` returns whole texts or none."""
    unfinished = sum(request.finish_reason in (None, FinishReason.CANCELLED) for request in requests)
    _require_all(unfinished, len(requests))
    for request in requests:
        if request.error is not None:
            reason = str(request.error).rstrip(".")
            raise RequestFailedError(
                f"One of {len(requests)} texts failed: {type(request.error).__name__}: {reason}. "
                "Use generate_batch, which gives every text as far as it came, with its error."
            ) from request.error
    ended = sum(request.finish_reason is FinishReason.MEMORY for request in requests)
    if ended:
        raise PoolTooSmallError(
            f"{ended} of {len(requests)} requests could be held neither by the KV pool nor by host memory, which gave "
            "less than SpecConfig.host_pool_tokens asks for. Lower SpecConfig.max_requests, or use generate_batch, "
            "which returns what could be completed."
        )
