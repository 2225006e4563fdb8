"""Products in halves: which ones, that logits stay, and what a compiler makes of adding them."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from sparsespec_compile.kernels.ops import halved_product
from sparsespec_compile.passes.cost.graph import graph_cost
from sparsespec_compile.passes.pipeline import compile_model
from sparsespec_compile.passes.rewrites import halve_products

from .families import DOZEN, logits, telling, tiny, tokens
from .prefill import prefill, prefill_step

aten = torch.ops.aten
SEQUENCE = tokens(13)
LOOP = "for("


@pytest.fixture
def whole():
    """A compiled model with whole products; ask for it before `halving`."""
    return compile_model(tiny("qwen3"), page_size=16)


@pytest.fixture
def halving(monkeypatch):
    """Takes every weight for one that gains, on a CPU too."""
    monkeypatch.setattr(halve_products, "suits", lambda weight: weight.shape[1] % 16 == 0)


def calls(compiled, target):
    return compiled.graph_module.graph.find_nodes(op="call_function", target=target)


FAMILIES = [name for name in DOZEN if name not in ("mixtral", "gpt2")]


@pytest.mark.parametrize("family", telling(FAMILIES))
def test_halves_what_residuals_and_norms_read(halving, family):
    """Two products a layer, and logits are those of the model up to the rounding of sums in another order."""
    model = tiny(family)
    compiled = compile_model(model, page_size=16)
    expected = logits(model, SEQUENCE)
    assert len(calls(compiled, halved_product)) == 2 * len(compiled.layout.layers)
    assert torch.allclose(prefill(compiled, [SEQUENCE])[0], expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2", "gemma3_text", "phi3"))],
)
def test_halves_the_same_where_norms_convert(halving, family):
    """As in bfloat16, where they take float32."""
    compiled = compile_model(tiny(family).bfloat16(), page_size=16)
    assert len(calls(compiled, halved_product)) == 2 * len(compiled.layout.layers)


def test_what_has_a_bias_stays_whole(halving):
    assert not calls(compile_model(tiny("opt"), page_size=16), halved_product)


def test_leaves_what_attention_and_others_read(halving):
    """Slices of q, k and v, of gate and up, and the logits keep their products."""
    compiled = compile_model(tiny("qwen2"), page_size=16)
    kept = calls(compiled, aten.linear.default)
    assert len(kept) == 2 * len(compiled.layout.layers) + 1
    assert {str(user.target) for node in kept for user in node.users} == {"aten.slice.Tensor", "output"}


def test_changes_in_place_reach_the_halves(halving):
    model = tiny("llama")
    compiled = compile_model(model, page_size=16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1.5)
    expected = logits(model, SEQUENCE)
    assert torch.allclose(prefill(compiled, [SEQUENCE])[0], expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_cost_is_that_of_whole_products(whole, halving):
    halved = compile_model(tiny("qwen3"), page_size=16)
    assert calls(halved, halved_product)
    assert not calls(whole, halved_product)
    assert graph_cost(halved.graph_module).terms == graph_cost(whole.graph_module).terms


@pytest.mark.slow
def test_adding_takes_no_loop_of_its_own(whole, halving):
    """Inductor adds the halves in the loops that read them, for any number of rows.

    Of the three regions the second is that of all layers between; behind the last layer a CPU's code has one loop more.
    """
    model = tiny("qwen3")
    compiled = compile_model(model, page_size=16)
    forward, codes = run_and_get_code(compiled.compile_regions)
    _, others = run_and_get_code(whole.compile_regions)
    assert codes[1].count(LOOP) == others[1].count(LOOP) > 0
    assert ["halved_product" in code for code in codes] == [False, True, True]
    for sequence in (SEQUENCE, tokens(37, seed=2)):
        step = prefill_step(compiled.layout, [sequence])
        with torch.no_grad():
            got = forward(*step.inputs)[0]
        expected = logits(model, sequence)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    ("columns", "inner", "dtype", "expected"),
    [
        (4096, 12288, torch.bfloat16, True),
        (5120, 5120, torch.bfloat16, True),
        (5248, 5120, torch.bfloat16, False),
        (512, 512, torch.bfloat16, False),
        (4096, 12296, torch.bfloat16, False),
        (4096, 4096, torch.float16, False),
        (4096, 4096, torch.float32, False),
    ],
)
def test_which_weights_suit(monkeypatch, columns, inner, dtype, expected):
    weight = torch.empty(columns, inner, dtype=dtype, device="meta")
    assert not halve_products.suits(weight)  # on any other device
    monkeypatch.setattr(halve_products, "measured_on", lambda device: True)
    assert halve_products.suits(weight) == expected
    assert not halve_products.suits(torch.empty(inner, columns, dtype=dtype, device="meta").T)


@pytest.mark.gpu
def test_suits_on_a_gpu():
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert halve_products.suits(torch.empty(4096, 4096, dtype=torch.bfloat16, device="cuda")) == hopper


@pytest.mark.gpu
def test_logits_on_a_gpu_are_as_near_to_exact_ones_as_the_model_s():
    """In bfloat16, halves or not, against the same weights in float64."""
    wide = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "head_dim": 64}
    model = tiny("qwen3", **wide).bfloat16().cuda()
    exact = tiny("qwen3", **wide).bfloat16().double().cuda()
    with torch.no_grad():
        expected = exact(SEQUENCE[None].cuda()).logits[0]
        own = model(SEQUENCE[None].cuda()).logits[0]
    compiled = compile_model(model, page_size=16)
    halves = calls(compiled, halved_product)
    assert len(halves) == (4 if torch.cuda.get_device_capability()[0] == 9 else 0)
    step = prefill_step(compiled.layout, [SEQUENCE], dtype=torch.bfloat16)
    inputs = [tensor.cuda() for tensor in step.inputs]
    for forward in (compiled.graph_module, compiled.compile_regions()):
        with torch.no_grad():
            got = forward(*inputs)[0]
        assert (got - expected).norm() <= 1.5 * (own - expected).norm()
