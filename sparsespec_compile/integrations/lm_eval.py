"""lm-evaluation-harness on this engine: `simple_evaluate(model=SparseSpecLM(pretrained=model, ...), tasks=...)`."""

from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from sparsespec_compile.api import OptimizedModel, optimize
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import RequestFailedError, SamplingError
from sparsespec_compile.requests.generation_config import merge_settings, plain_sampling
from sparsespec_compile.requests.sampling_params import Completion, SamplingParams


class SparseSpecLM(HFLM):
    """`HFLM` whose generation tasks run on this engine, all requests of a task in one batch.

    Everything else, log-likelihoods among it, is `HFLM`'s own, on the same parameters. Texts are those of `HFLM`. The
    engine's memory is kept between tasks; `fast.release()` gives it back. `HFLM` itself is for one thread.

    Args:
        spec_config: settings of the engine; None = `SpecConfig()`. The model is compiled at the first generation.
        The others are `HFLM`'s; `batch_size` is for its own tasks alone.

    Raises:
        SamplingError: `mixed_precision_dtype`, which the engine does not have. Load the model in that dtype.
    """

    def __init__(self, *arguments: Any, spec_config: SpecConfig | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if self.mixed_precision_dtype is not None:
            raise SamplingError(
                f"mixed_precision_dtype={self.mixed_precision_dtype} is not supported: load the model in that dtype."
            )
        self._spec_config = spec_config

    @cached_property
    def fast(self) -> OptimizedModel:
        """The compiled model."""
        return optimize(self.model, self._spec_config)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts of generation requests, in their order.

        With a `think_end_token`, stop sequences do not end the reasoning in front of it; they cut the answer alone.

        Raises:
            SamplingError: a task's generation_kwargs that would change the text and are not supported.
            RequestFailedError: a text could not be finished.
            As `OptimizedModel.generate_batch`.
        """
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        prompts, sampling, stops = [], [], []
        for context, asked in (request.args for request in requests):
            settings = normalize_gen_kwargs(asked, self.max_gen_toks)
            stops.append(handle_stop_sequences(settings.pop("until", None), eos=eos))
            length = settings.pop("max_gen_toks")
            room = self.max_length - length
            ids, _ = self.tok_batch_encode([context], left_truncate_len=room, truncation=self.truncation)
            prompts.append(ids[0].tolist())
            sampling.append(self._sampling(settings, length, stops[-1]))
        completions = self.fast.generate_batch(
            prompts, sampling, tokenizer=self.tokenizer, progress=not disable_tqdm and self.rank == 0
        )
        texts = [self._text(completion, stop) for completion, stop in zip(completions, stops, strict=True)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _sampling(self, settings: dict[str, Any], length: int, stops: list[str]) -> SamplingParams:
        if not settings.get("do_sample"):
            settings.pop("temperature", None)
        draw = plain_sampling(merge_settings(self.model.generation_config, None, settings))
        strings = () if self.think_end_token is not None else [stop for stop in stops if stop]
        return SamplingParams(max_new_tokens=length, stop_strings=strings, **draw)

    def _text(self, completion: Completion, stops: list[str]) -> str:
        if completion.error is not None or completion.finish_reason.value == "memory":
            raise RequestFailedError(
                f"Text {completion.index} ended with {completion.finish_reason.value}. Lower max_requests, or give the "
                "engine more memory."
            ) from completion.error
        tokens, think = completion.token_ids, self.think_end_token
        if isinstance(think, int):
            after = [nth for nth, token in enumerate(tokens, 1) if token == think]
            tokens = tokens[after[-1] :] if after else tokens
        text = self.tok_decode(tokens)
        text = text.lstrip() if isinstance(think, int) else text
        return postprocess_generated_text(text, stops, think if isinstance(think, str) else None)
