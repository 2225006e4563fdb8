"""In place of transformers' continuous batching: `install` equips a model, `uninstall` restores it."""

import copy
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from sparsespec_compile.api import OptimizedModel, optimize
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import ConfigError, EngineBusyError, SamplingError, StoppedError, UnsupportedModelError
from sparsespec_compile.integrations.manager import Manager
from sparsespec_compile.integrations.results import finished, text_name
from sparsespec_compile.passes.capture.adapters import inner_model
from sparsespec_compile.passes.capture.wrappers import without_equal_autocast
from sparsespec_compile.requests.continuous_batching import (
    BatchSettings,
    EngineLimits,
    batching_fields,
    read_batch_settings,
    read_limits,
)
from sparsespec_compile.requests.prompts import integers
from sparsespec_compile.stream import TokenStream

_EQUIPPED = (
    "generate_batch",
    "init_continuous_batching",
    "continuous_batching_context_manager",
    "destroy_cached_continuous_batching_manager",
)
"""Methods of a model that `install` sets."""

_NOTHING = GenerationConfig()
"""For the engine: each request's sampling says everything, as the caller's configuration replaces the model's own."""


def install(model: PreTrainedModel, config: SpecConfig | None = None, *, release: bool = True) -> "Installation":
    """Equip a model: its `generate_batch` and its managers run on this engine, with transformers' results.

    Whatever calls transformers' continuous batching on the model, such as TRL's trainers and lighteval, then runs on
    this engine. The model is compiled at the first call, in the dtype that it has then. Its parameters stay its own: an
    optimizer's step takes effect at once. A copy or pickle of an equipped model is equipped, too.

    Install and uninstall while nothing generates. What they equip may be called from any thread, and its iterations
    run on a stream of the engine's own, as described at `OptimizedModel`.

    Args:
        model: what `optimize` takes, or a PEFT model around it.
        config: settings; None = `SpecConfig()`.
        release: whether the memory of KV pool, scores and captured steps is given back at the end of each
            `generate_batch`, and when a manager stops, as transformers does; `persistent_manager=True` keeps it for
            one call. Compiled code is kept.

    Returns:
        What the model is equipped with; also to release memory by hand and to read statistics.

    Raises:
        UnsupportedModelError: not a transformers model. Whether it can be compiled is seen at the first call.
        ConfigError: `config` is not a `SpecConfig`.

    Example:
        >>> install(model, SpecConfig(memory_fraction=0.5))
        >>> outputs = model.generate_batch(prompts, generation_config=GenerationConfig(max_new_tokens=512))
        >>> texts = [output.generated_tokens for output in outputs.values()]
    """
    model = _inner(model)
    config = SpecConfig() if config is None else config
    if not isinstance(config, SpecConfig):
        raise ConfigError(f"config must be a SpecConfig(name=value, ...), got {type(config).__name__}.")
    if not isinstance(release, bool):
        raise ConfigError(f"release must be True or False, got {release!r}.")
    uninstall(model)
    installation = Installation(model, config, release)
    for name in _EQUIPPED:
        vars(model)[name] = getattr(installation, name)
    return installation


def uninstall(model: PreTrainedModel) -> None:
    """Restore what `install` has changed; nothing to do for a model that is not equipped. Memory is given back.

    Raises:
        EngineBusyError: a generation is unfinished.
    """
    model = _inner(model)
    installation = getattr(vars(model).get(_EQUIPPED[0]), "__self__", None)
    if isinstance(installation, Installation):
        installation.release()
        for name in _EQUIPPED:
            vars(model).pop(name, None)


class Installation:
    """What a model is equipped with. Get it from `install`.

    Every method may be called from any thread. The compiled model is kept until `uninstall`, the memory of its state
    until the end of each `generate_batch`, unless `install(release=False)` was called.

    Attributes:
        model: the model.
        config: settings, within what the first caller's `continuous_batching_config` allows.
    """

    def __init__(self, model: PreTrainedModel, config: SpecConfig, release: bool) -> None:
        self.model = model
        self.config = config
        self._release = release
        self._fast: OptimizedModel | None = None
        self._compiling = threading.Lock()
        self._cached: Manager | None = None

    @property
    def fast(self) -> OptimizedModel:
        """The compiled model, on the model's own parameters; compiled now if it was not."""
        with self._compiling:
            if self._fast is None:
                with without_equal_autocast(self.model, self.model.dtype):
                    self._fast = optimize(self.model, self.config)
                self._fast._compiled.record.again = "install(model)"
            return self._fast

    def release(self) -> None:
        """Give the memory of KV pool, scores and captured steps back. Compiled code is kept.

        Raises:
            EngineBusyError: a generation is unfinished.
        """
        if self._fast is not None:
            self._fast.release()

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        **arguments: Any,
    ) -> dict[str, GenerationOutput]:
        """Continue many prompts, as transformers' `generate_batch` does. The model is left in evaluation mode.

        Args:
            inputs: token ids of each prompt.
            generation_config: how; None = the model's own. As in transformers, the one given replaces the model's own
                as a whole, filters that it does not name are off, and texts end at eos_token_id and max_new_tokens.
                Where neither max_new_tokens nor max_length is said, a text may take the model's positions.
            continuous_batching_config: return_logprobs and seed are applied. max_memory_percent and
                max_requests_per_batch bound the engine when the model is compiled, and are refused where it may take
                more. Fields that say how transformers' own engine works have no effect here.
            record_timestamps: whether results tell when each token became final. Those of one verification do so
                together.
            progress_bar: whether to show one.
            persistent_manager: whether to keep the engine's memory for the next call.
            warmup: without effect: steps are captured before they are needed.
            **arguments: max_new_tokens, over that of `generation_config`.

        Returns:
            A result for each text by its name, in the order of the prompts: "req_3" for prompt 3; with
            num_return_sequences=n also "req_3__child#0" to "req_3__child#(n - 2)" before it.

        Raises:
            PromptError: a prompt that is not token ids.
            SamplingError: an unknown argument, or settings that would change the text and are not supported.
            ConfigError: a `continuous_batching_config` that asks for what the engine does not do.
            As `OptimizedModel.generate_batch` otherwise.
        """
        max_new_tokens = self._max_new_tokens(arguments)
        settings, limits = self.read(generation_config, continuous_batching_config)
        if len(inputs) == 0:
            return {}
        prompts = [integers(f"Prompt {nth}", prompt, texts=False) for nth, prompt in enumerate(inputs)]
        sampling = [settings.sampling(nth, len(prompt), max_new_tokens) for nth, prompt in enumerate(prompts)]
        results: dict[tuple[int, int], GenerationOutput] = {}
        fast = self.ready(limits)
        created = time.perf_counter()
        try:
            with without_equal_autocast(self.model, self.model.dtype):
                stream = fast.stream(prompts, sampling, progress=progress_bar, generation_config=_NOTHING)
            for (index, sample), result in _results(stream, created, record_timestamps):
                results[index, sample] = result
        finally:
            if self._release and not persistent_manager:
                self._release_unless_busy()
        if stream.unfinished:
            raise StoppedError(f"stop() ended {stream.unfinished} of {len(results) + stream.unfinished} texts.")
        for (index, sample), result in results.items():
            result.request_id = text_name(f"req_{index}", sample, settings.texts)
            result.prompt_ids = prompts[index]
        return {results[name].request_id: results[name] for name in sorted(results)}

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: object = None,
    ) -> Manager:
        """A manager that takes requests at any time; the model is put in evaluation mode.

        Args:
            generation_config, continuous_batching_config: as in `generate_batch`; max_queue_size is applied.
            workload_hints: without effect: sizes follow from `SpecConfig`.

        Raises:
            As `generate_batch`.
        """
        if self._cached is not None:
            return self._cached
        settings, limits = self.read(generation_config, continuous_batching_config)
        queue_size = 0 if continuous_batching_config is None else continuous_batching_config.max_queue_size
        return Manager(self, settings, queue_size, lambda: self._open_stream(limits))

    @contextmanager
    def continuous_batching_context_manager(
        self,
        generation_config: GenerationConfig | None = None,
        block: bool = True,
        timeout: float | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        persistent_manager: bool = False,
        warmup: bool = True,
        workload_hints: object = None,
    ) -> Iterator[Manager]:
        """A block with a manager that is started, and stopped at the end; arguments as in transformers."""
        manager = self.init_continuous_batching(generation_config, continuous_batching_config, workload_hints)
        manager.start()
        try:
            yield manager
        finally:
            manager.stop(block=block, timeout=timeout, keep_for_next_session=persistent_manager)

    def destroy_cached_continuous_batching_manager(self) -> None:
        """Stop the manager that was kept for the next session, if there is one, and give its memory back."""
        cached, self._cached = self._cached, None
        if cached is not None:
            cached.stop()
            self._release_unless_busy()

    def keep(self, kept: Manager | None, manager: Manager) -> None:
        """Keep a manager for the next session, or no longer."""
        if kept is not None or self._cached is manager:
            self._cached = kept

    def manager_ended(self, manager: Manager) -> None:
        """A manager's threads have ended."""
        if self._release and self._cached is not manager:
            self._release_unless_busy()

    def _open_stream(self, limits: EngineLimits) -> TokenStream:
        fast = self.ready(limits)
        with without_equal_autocast(self.model, self.model.dtype):
            return fast.stream((), open_ended=True, generation_config=_NOTHING)

    def read(
        self, generation_config: GenerationConfig | None, batching: ContinuousBatchingConfig | None
    ) -> tuple[BatchSettings, EngineLimits]:
        """What a caller's configurations ask for; None = the model's own, and defaults."""
        if generation_config is None:
            generation_config = self.model.generation_config
        if batching is None:
            batching = getattr(generation_config, "continuous_batching_config", None)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        limits = read_limits(batching)
        return read_batch_settings(generation_config, batching, positions), limits

    def ready(self, limits: EngineLimits) -> OptimizedModel:
        """The compiled model, with the model in evaluation mode, within the limits."""
        if self._fast is None:
            self.config = replace(self.config, **limits.bounded(self.config))
        limits.require(self.config)
        self.model.eval()
        return self.fast

    def _max_new_tokens(self, arguments: dict[str, Any]) -> int | None:
        unknown = sorted(arguments.keys() - {"max_new_tokens"} - batching_fields())
        if unknown:
            raise SamplingError(
                f"generate_batch got unknown argument(s) {', '.join(unknown)}. Beside its own it takes max_new_tokens; "
                "everything else about texts stands in generation_config."
            )
        return arguments.get("max_new_tokens")

    def _release_unless_busy(self) -> None:
        with suppress(EngineBusyError):  # another thread's generation goes on, and gives it back at its end
            self.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Installation":
        return Installation(copy.deepcopy(self.model, memo), self.config, self._release)

    def __reduce__(self) -> tuple[Any, ...]:
        return Installation, (self.model, self.config, self._release)


def _results(
    stream: TokenStream, created: float, record_timestamps: bool
) -> Iterator[tuple[tuple[int, int], GenerationOutput]]:
    stamps: dict[tuple[int, int], list[float]] = {}
    for piece in stream:
        name = piece.index, piece.sample
        if record_timestamps:
            stamps.setdefault(name, []).extend([time.perf_counter()] * len(piece.token_ids))
        if piece.completion is not None:
            yield name, finished(piece.completion, created, stamps.get(name, []) if record_timestamps else None)


def _inner(model: Any) -> PreTrainedModel:
    """The transformers model that a PEFT model is around, or the model itself."""
    inner = inner_model(model)
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"install takes a loaded transformers model, or a PEFT model around one, got {type(model).__name__}."
        )
    return inner
