"""Texts for the rows of a Ray dataset: `Dataset.map_batches(Generate, ...)`, one compiled model in each actor."""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow
import torch
from filelock import FileLock

from sparsespec_compile.api import OptimizedModel, optimize
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import (
    ConfigError,
    ContextLengthError,
    MemoryPlanError,
    PoolTooSmallError,
    PromptError,
    SamplingError,
)
from sparsespec_compile.passes.compat import compile_cache_dir
from sparsespec_compile.requests.prompts import Prompt
from sparsespec_compile.requests.sampling_params import Completion, SamplingParams
from sparsespec_compile.stream import TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = Mapping[str, Any]
"""A row of the dataset: its values by the names of their columns."""

_COLUMNS = pyarrow.schema(
    [
        ("sample", pyarrow.int64()),
        ("text", pyarrow.string()),
        ("token_ids", pyarrow.list_(pyarrow.int64())),
        ("logprobs", pyarrow.list_(pyarrow.float64())),
        ("finish_reason", pyarrow.string()),
        ("error", pyarrow.string()),
    ]
)

_OF_A_ROW = (PromptError, SamplingError, ContextLengthError, PoolTooSmallError)
"""Refusals of a single prompt or of its settings."""

_CALLS = 64
"""Batches that an actor takes at once, at most; Ray gives it fewer."""


class Tokenizer(Protocol):
    """What is used of a HuggingFace tokenizer."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = False) -> str:
        """Text of some tokens."""

    def __call__(self, text: str) -> Any:
        """The encoded text; its `input_ids` are the tokens."""


class _Ask(NamedTuple):
    """What a row asks for."""

    prompt: Prompt
    sampling: SamplingParams | None


class Generate:
    """Continues the prompts of a dataset. Ray makes one in each actor:

    >>> texts = dataset.map_batches(
    ...     Generate,
    ...     fn_constructor_kwargs={"load_model": load_model, "tokenizer": tokenizer, "sampling": SamplingParams()},
    ...     batch_format="pyarrow",
    ...     batch_size=32,
    ...     num_gpus=1,
    ...     compute=ActorPoolStrategy(size=8, max_concurrent_calls_per_actor=2),
    ... )

    Batches that an actor works on at the same time share the model's iterations, so that the next ones are admitted
    while the last texts of one are written. Ray gives an actor four batches of a block at once
    (`RAY_DATA_DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY`), and with `max_concurrent_calls_per_actor=2` those of the next
    block as well. `SpecConfig.max_requests` says how many texts are decoded together.

    The model is loaded and compiled when the actor starts. Actors of one host compile one after the other, and each
    finds in Inductor's cache folder what an earlier one has compiled. For hosts to share it, put the folder on a file
    system of theirs, by TORCHINDUCTOR_CACHE_DIR in Ray's `runtime_env`.

    Args:
        load_model: called in the actor; returns the model, on its device and in its dtype.
        sampling: how prompts are continued: all alike, or a function of the row; None = as the model's
            `generation_config` says. Texts are the same in every run, and after Ray has repeated a task, if each row
            has a seed of its own: a function may derive it from the row.
        tokenizer: encodes prompts that are texts, decodes what is generated, and finds stop strings. None: prompts are
            token ids, and there is no text.
        config: settings of `optimize`; None = `SpecConfig()`.
        column: the dataset's column of prompts: texts, or token ids.

    Raises:
        As `optimize`, and `ConfigError` for arguments of a wrong type.
    """

    def __init__(
        self,
        load_model: "Callable[[], PreTrainedModel]",
        sampling: SamplingParams | Callable[[Row], SamplingParams] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        config: SpecConfig | None = None,
        column: str = "prompt",
    ) -> None:
        if not callable(load_model):
            raise ConfigError(
                f"load_model must be a function that returns a loaded model, got {type(load_model).__name__}. It is "
                "called in each actor."
            )
        if sampling is not None and not isinstance(sampling, SamplingParams) and not callable(sampling):
            raise ConfigError(
                f"sampling must be SamplingParams, a function of a row that returns them, or None, got {sampling!r:.80}"
                "."
            )
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._column = column
        self._encoding = threading.Lock()  # tokenizers set their options when they encode
        self._threads = ThreadPoolExecutor(_CALLS, thread_name_prefix="sparsespec-batch")
        torch.seed()  # every process begins with the same one, and texts without a seed of their own would repeat
        self._model = _compile_in_turn(load_model(), config)

    async def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """Continue a batch.

        Args:
            batch: rows; `map_batches` must be given `batch_format="pyarrow"`.

        Returns:
            The rows, each as often as it has texts, with further columns: `sample` (which text of the row, from 0),
            `text` (None without a tokenizer), `token_ids`, `logprobs` (empty unless `SamplingParams.logprobs`),
            `finish_reason` (a value of `FinishReason`), and `error`. What fails for a row alone, such as its prompt,
            its settings or the decoding of its tokens, is named in its `error`; it is None in all others. A row
            without a text comes once, with None in the other new columns.

        Raises:
            ConfigError: the batch is no Arrow table, has no column of prompts, or has one of the new columns.
            As `OptimizedModel.stream` for what is not a single row's fault; Ray decides whether to try again.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._generate, batch)

    def _generate(self, batch: pyarrow.Table) -> pyarrow.Table:
        self._require_columns(batch)
        errors: dict[int, Exception] = {}
        asked: dict[int, _Ask] = {}
        for row, prompt in enumerate(batch[self._column].to_pylist()):
            try:
                asked[row] = self._read(prompt, batch, row)
            except Exception as error:  # the caller's function or tokenizer: whatever it raises is this row's
                errors[row] = error
        with self._model.stream([], tokenizer=self._tokenizer) as stream:
            rows = _add(stream, asked, errors)
            texts = [(rows[piece.completion.index], piece.completion) for piece in stream if piece.completion]
        texts.sort(key=lambda text: (text[0], text[1].sample))
        results = [(row, self._values(completion)) for row, completion in texts]
        results += [(row, {"error": _told(error)}) for row, error in errors.items()]
        results.sort(key=lambda result: result[0])
        taken = [row for row, _ in results]
        table = batch if taken == [*range(batch.num_rows)] else batch.take(taken)
        for field in _COLUMNS:
            values = [value.get(field.name) for _, value in results]
            table = table.append_column(field, pyarrow.array(values, field.type))
        return table

    def _require_columns(self, batch: Any) -> None:
        if not isinstance(batch, pyarrow.Table):
            raise ConfigError(
                f"Generate takes batches of the type pyarrow.Table, got {type(batch).__name__}: give map_batches "
                'batch_format="pyarrow".'
            )
        names = batch.column_names
        if self._column not in names:
            raise ConfigError(
                f"The dataset has no column {self._column!r} of prompts; it has {', '.join(map(repr, names))}. Name "
                "it with column=."
            )
        twice = [name for name in _COLUMNS.names if name in names]
        if twice:
            raise ConfigError(
                f"The dataset has columns that Generate adds: {', '.join(map(repr, twice))}. Rename or drop them."
            )

    def _read(self, prompt: Any, batch: pyarrow.Table, row: int) -> _Ask:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise PromptError("The prompt is a text, and there is no tokenizer. Pass tokenizer=, or token ids.")
            with self._encoding:
                prompt = self._tokenizer(prompt).input_ids
        sampling = self._sampling
        if sampling is not None and not isinstance(sampling, SamplingParams):
            sampling = sampling(batch.slice(row, 1).to_pylist()[0])
        return _Ask(prompt, sampling)

    def _values(self, completion: Completion) -> dict[str, Any]:
        """The new columns of a text."""
        text, error = None, completion.error
        if self._tokenizer is not None:
            try:
                text = self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            except Exception as own:  # as above
                error = error or own
        return {
            "sample": completion.sample,
            "text": text,
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason.value,
            "error": None if error is None else _told(error),
        }


def _add(stream: TokenStream, asked: Mapping[int, _Ask], errors: dict[int, Exception]) -> dict[int, int]:
    """Give a stream what rows ask for; rows that it refuses get an error. The row of each of the stream's prompts."""
    try:
        numbers = stream.add([ask.prompt for ask in asked.values()], [ask.sampling for ask in asked.values()])
        return dict(zip(numbers, asked, strict=True))
    except MemoryPlanError:  # there is no memory for any row
        raise
    except _OF_A_ROW:
        return dict(_one_by_one(stream, asked, errors))


def _one_by_one(
    stream: TokenStream, asked: Mapping[int, _Ask], errors: dict[int, Exception]
) -> Iterator[tuple[int, int]]:
    for row, ask in asked.items():
        try:
            (number,) = stream.add([ask.prompt], [ask.sampling])
        except _OF_A_ROW as error:
            errors[row] = error
        else:
            yield number, row


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _compile_in_turn(model: "PreTrainedModel", config: SpecConfig | None) -> OptimizedModel:
    """Compile while no other process of this host compiles a model of the same configuration."""
    folder = Path(compile_cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr(getattr(model, "config", None)).encode()).hexdigest()[:16]
    with FileLock(folder / f"sparsespec-{key}.lock"):
        return optimize(model, config)
