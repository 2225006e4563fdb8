"""transformers' own server, `transformers serve --continuous-batching`, with this engine in it.

The server is transformers' from its command line to its answers. It loads models through `EquippedModels`, so that each
is equipped, and hands requests on through `RequestsOfTheirOwn`, which gives each request the sampling settings that it
asks for; in transformers all share those of the first.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from fastapi import HTTPException
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager, utils

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import SparseSpecError
from sparsespec_compile.integrations.transformers import install

_CANNOT = 422  # a request that is understood and cannot be carried out


class EquippedModels(model_manager.ModelManager):
    """Loads models as transformers' server does, and equips them.

    Attributes:
        spec_config: settings of the engine, for every model.
    """

    spec_config: SpecConfig | None = None

    def _load_model(self, *arguments: Any, **settings: Any) -> PreTrainedModel:
        model = super()._load_model(*arguments, **settings)
        install(model, self.spec_config)
        return model


class RequestsOfTheirOwn(utils.CBGenerateManager):
    """Hands requests on to the model's manager, each with its own generation settings; refusals are the client's."""

    def init_cb(self, model: PreTrainedModel, gen_config: GenerationConfig) -> None:
        """Start the model's manager with the first request."""
        with _told_to_the_client():
            super().init_cb(model, gen_config)

    def generate_streaming(self, model: Any, *args: Any, **named: Any) -> Any:
        """As transformers'."""
        with self._of_its_own(*args, **named):
            return super().generate_streaming(model, *args, **named)

    async def generate_non_streaming(self, model: Any, *args: Any, **named: Any) -> Any:
        """As transformers'."""
        with self._of_its_own(*args, **named):
            return await super().generate_non_streaming(model, *args, **named)

    @contextmanager
    def _of_its_own(
        self, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str, *args: Any, **named: Any
    ) -> Iterator[None]:
        """Give the request its settings. Arguments are those of transformers' methods behind the model."""
        manager: Any = self._cb
        with _told_to_the_client():
            manager.configure(request_id, gen_config)
            yield


def serve(model: str, spec_config: SpecConfig | None = None, **settings: Any) -> Serve:
    """Start transformers' server for a model; from now on, every one that this process starts has this engine in it.

    Args:
        model: folder or hub id.
        spec_config: settings of the engine; None = `SpecConfig()`.
        **settings: arguments of transformers' `Serve`, such as host and port. With non_blocking=True it returns, and
            `kill_server()` of what it returns ends the server.
    """
    _put_in_place(spec_config)
    return Serve(force_model=model, continuous_batching=True, **settings)


def main(arguments: list[str]) -> int:
    """`python -m sparsespec_compile serve MODEL`, with the options of `transformers serve` and `--spec-config`."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--spec-config", type=json.loads, default={}, help="SpecConfig as JSON: '{\"draft_tokens\": 8}'")
    ours, theirs = own.parse_known_args(arguments)
    _put_in_place(SpecConfig(**ours.spec_config))
    command = typer.Typer()
    command.command(epilog=own.format_help())(Serve)
    command([*theirs, *([] if "--continuous-batching" in theirs else ["--continuous-batching"])], standalone_mode=True)
    return 0


def _put_in_place(spec_config: SpecConfig | None) -> None:
    EquippedModels.spec_config = spec_config
    vars(model_manager)["ModelManager"] = EquippedModels
    vars(utils)["CBGenerateManager"] = RequestsOfTheirOwn


@contextmanager
def _told_to_the_client() -> Iterator[None]:
    try:
        yield
    except SparseSpecError as error:
        raise HTTPException(_CANNOT, f"{type(error).__name__}: {error}") from error
