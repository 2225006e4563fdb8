"""What the caller has set around a call (autocast, a default device, generators) neither reaches it nor is changed."""

import ast
import random
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import sparsespec_compile as ss
from sparsespec_compile.runtime.device.step import without_autocast

from .support.models import left_padded, tiny

NEW = 24


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3", num_hidden_layers=1)


def settings(backend):
    return ss.SpecConfig(draft_tokens=3, min_budget=6, backend=backend)


@contextmanager
def surroundings(*names, device="cpu"):
    """The caller's settings of these names."""
    with ExitStack() as stack:
        if "autocast" in names:
            stack.enter_context(torch.autocast(device, torch.bfloat16))
        if "default device" in names:
            stack.enter_context(torch.device("meta"))
        yield


def texts(fast, input_ids, mask):
    """All that a model can be asked for."""
    padded = fast.generate(input_ids, mask, max_new_tokens=NEW)
    drawn = fast.generate(input_ids, mask, max_new_tokens=NEW, do_sample=True, seed=3)
    params = ss.SamplingParams(max_new_tokens=NEW, temperature=0.8, seed=3, n=2, logprobs=True)
    batch = fast.generate_batch([[5, 6, 7], [8]], params)
    return padded.tolist(), drawn.tolist(), [(text.token_ids, text.logprobs) for text in batch]


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        ("eager", ["autocast"]),
        ("eager", ["default device"]),
        pytest.param("inductor", ["autocast", "default device"], marks=pytest.mark.slow),
    ],
)
def test_what_is_set_around_optimize_and_generations_does_not_reach_them(model, backend, names):
    input_ids, mask = left_padded(3, 11)
    expected = model.generate(input_ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    with surroundings(*names):
        fast = ss.optimize(model, settings(backend))
        inside = texts(fast, input_ids, mask)
    assert inside[0] == expected.tolist()
    assert texts(fast, input_ids, mask) == inside


def test_a_stream_leaves_the_callers_autocast_as_it_is_between_pieces(model):
    fast = ss.optimize(model, settings("eager"))
    params = ss.SamplingParams(max_new_tokens=NEW)
    (expected,) = fast.generate_batch([[5, 6, 7]], params)
    with torch.autocast("cpu", torch.bfloat16):
        stream = fast.stream([[5, 6, 7]], params)
        tokens = next(stream).token_ids
        assert torch.is_autocast_enabled("cpu")
    for piece in stream:
        assert not torch.is_autocast_enabled("cpu")
        tokens = tokens + piece.token_ids
    assert tokens == expected.token_ids


def test_autocast_is_off_within_and_back_behind_an_error():
    def fail():
        with without_autocast(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")
            raise ValueError("within")

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="within"):
            fail()
        assert torch.is_autocast_enabled("cpu")


def generators():
    """The states of all global generators."""
    devices = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return (
        [torch.get_rng_state().tolist(), *map(torch.Tensor.tolist, devices)],
        random.getstate(),
        repr(np.random.get_state()),
    )


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_neither_optimize_nor_greedy_texts_nor_given_seeds_advance_a_generator(model, backend):
    input_ids, mask = left_padded(3, 11)
    before = generators()
    fast = ss.optimize(model, settings(backend))
    assert generators() == before
    texts(fast, input_ids, mask)
    fast.generate_batch([[5, 6, 7], [8]])
    list(fast.stream([[5, 6, 7]], ss.SamplingParams(max_new_tokens=NEW)))
    list(fast.as_completed([[5, 6, 7]], ss.SamplingParams(max_new_tokens=NEW, n=2)))
    assert generators() == before


def test_every_tensor_is_made_on_a_named_device():
    """Also those that no test above meets, such as the launchers' on a GPU."""
    root = Path(__file__).parents[1]
    makers = {maker.__name__ for maker in torch.utils._device._device_constructors()}
    folders = [root / folder for folder in ("sparsespec_compile", "passes", "kernels")]
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in {f"torch.{name}" for name in makers}:
                assert "device" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.Generator":
                assert call.args or call.keywords, f"{path}:{call.lineno}"


@pytest.mark.gpu
def test_on_a_gpu_likewise():
    model = tiny("qwen3", num_hidden_layers=1, head_dim=64).to("cuda", torch.bfloat16)
    input_ids, mask = (tensor.cuda() for tensor in left_padded(3, 11))
    outside = texts(ss.optimize(model, settings("auto")), input_ids, mask)
    before = generators()
    with surroundings("autocast", "default device", device="cuda"):
        assert texts(ss.optimize(model, settings("auto")), input_ids, mask) == outside
    assert generators() == before
