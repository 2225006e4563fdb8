"""The forms of a model whose adapters change: a compiled graph with an engine of its own for each state of them."""

import threading
from typing import NamedTuple

from transformers import PreTrainedModel

from sparsespec_compile.compile.target import compile_target
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import EngineBusyError, StaleParametersError, TrainingModeError
from sparsespec_compile.passes.capture.adapters import AdapterState, adapter_layers, adapter_state, settle_adapters
from sparsespec_compile.passes.pipeline import CompiledModel
from sparsespec_compile.passes.proofs.unchanged import ModelRecord
from sparsespec_compile.runtime.host.engine import Engine

MOST_FORMS = 4
"""That are kept: merged and unmerged, another adapter, none. Beyond them the one that was left longest ago goes."""


class Form(NamedTuple):
    """A model in one state of its adapters, compiled. Its engine has memory on the device while it is in use."""

    compiled: CompiledModel
    engine: Engine


class Forms:
    """Compiles a model, and once more whenever its adapters are in a state that is new.

    Attributes:
        lock: whoever takes another form holds it.
        first: the form for the model as it was at the beginning.

    Raises:
        UnsupportedModelError: as `optimize`.
    """

    def __init__(self, model: PreTrainedModel, config: SpecConfig) -> None:
        self.lock = threading.RLock()
        self._model = model
        self._config = config
        self._left: dict[AdapterState, Form] = {}  # the latest last
        settle_adapters(model)
        self._state = adapter_state(model)
        self.first = self._compile()

    def _compile(self) -> Form:
        compiled, target = compile_target(self._model, self._config)
        return Form(compiled, Engine(target, self._config))

    def follow(self, form: Form) -> Form | None:
        """The form for the model as it is now; None where `form`, the one in use, still is.

        Raises:
            StaleParametersError: something else than adapters has changed, ranks share the model, or a generation on
                `form` is unfinished.
            TrainingModeError: the model drops values at random.
            UnsupportedModelError: the model cannot be compiled any longer; `form` stays in use.
        """
        try:
            form.compiled.record.require()
            return None
        except StaleParametersError as error:
            if form.compiled.ranks is not None or not self._only_adapters(form.compiled.record):
                raise
            try:
                form.engine.release()
            except EngineBusyError as busy:
                raise StaleParametersError(f"{error} What was changed are adapters, and {busy}") from error
        settle_adapters(self._model)  # not before, as texts were being written with these weights
        left, state = self._state, adapter_state(self._model)
        found = self._left.pop(state, None)
        if found is None or not _is_current(found):
            found = self._compile()
        self._left[state] = found
        found.compiled.record.require()
        self._left.pop(state)
        if left != state:
            self._left[left], self._state = form, state
        while len(self._left) >= MOST_FORMS:
            del self._left[next(iter(self._left))]
        return found

    def _only_adapters(self, record: ModelRecord) -> bool:
        """Whether adapters are in another state, or nothing but their layers has changed."""
        if adapter_state(self._model) != self._state:
            return True
        layers = adapter_layers(self._model)
        return all(
            any(name == path or name.startswith(path + ".") for path in layers) for name in record.changed_modules()
        )


def _is_current(form: Form) -> bool:
    try:
        form.compiled.record.require()
    except StaleParametersError:
        return False
    except TrainingModeError:
        pass
    return True
