"""Rotary frequencies that follow the longest sequence: equal text up to where they change, refused from there on."""

import pytest
import torch

import sparsespec_compile as ss
from sparsespec_compile.errors import ContextLengthError, PositionError
from sparsespec_compile.passes.capture.capture import capture
from sparsespec_compile.passes.capture.positions import has_position_table
from sparsespec_compile.passes.capture.rotary import positions_of, steady_positions

from .families import EXPERTS, NARROW, tiny

LENGTH = 96
"""Positions of the tiny models before their frequencies change."""

FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0, 5.0, 6.0, 7.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": LENGTH, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
CASES = {
    "phi3": {**NARROW, "rope_parameters": LONGROPE, "original_max_position_embeddings": LENGTH},
    "llama": {**NARROW, "rope_parameters": DYNAMIC, "max_position_embeddings": LENGTH},
    "phimoe": {
        **EXPERTS,
        "num_local_experts": 4,
        "rope_parameters": {**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.4},
        "original_max_position_embeddings": LENGTH,
    },
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "phi3" else pytest.mark.slow) for name in CASES]
)
def test_texts_are_equal_up_to_where_frequencies_change_and_refused_beyond(family):
    model = tiny(family, **CASES[family])
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(2, 90, (1, 40), generator=generator)
    new = LENGTH - prompt.shape[1]
    expected = model.generate(prompt, max_new_tokens=new, do_sample=False)
    assert len(expected[0, 40:].unique()) > 10
    with torch.no_grad():
        # It leaves the model's own frequencies at those of long texts.
        logits = model(torch.randint(2, 90, (1, LENGTH + 40), generator=generator)).logits
        left = [buffer.clone() for buffer in model.buffers()]
        fast = ss.optimize(model, ss.SpecConfig(draft_tokens=4, min_budget=8, budget_ratio=0.01))
        assert all(map(torch.equal, left, model.buffers())), "a capture changes nothing of the model"
    assert torch.equal(fast.generate(prompt, max_new_tokens=new, do_sample=False), expected)
    assert fast.stats.accepted_per_cycle < 4
    with pytest.raises(ContextLengthError, match=f"need {LENGTH + 1} .* has {LENGTH}: beyond, its rotary"):
        fast.generate(prompt, max_new_tokens=new + 1, do_sample=False)
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_the_model_may_be_used_between_texts(family):
    model = tiny(family, **CASES[family])
    prompt = torch.arange(2, 42)[None]
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=4, min_budget=8, budget_ratio=0.01))
    expected = fast.generate(prompt, max_new_tokens=20, do_sample=False)
    for used in (torch.arange(2, 90).repeat(2), torch.arange(2, 12)):  # it changes its frequencies, and takes them back
        with torch.no_grad():
            model(used[None])
        assert torch.equal(fast.generate(prompt, max_new_tokens=20, do_sample=False), expected)


def test_where_frequencies_change_is_known():
    phi3, llama = (tiny(family, **CASES[family]) for family in ("phi3", "llama"))
    assert steady_positions(phi3) == positions_of(phi3) == LENGTH
    assert steady_positions(llama) == positions_of(llama) == LENGTH
    assert steady_positions(tiny("gpt2")) is None
    assert has_position_table(capture(phi3).graph_module)


def test_a_module_may_compute_other_frequencies_than_its_configuration_names():
    """As Hunyuan's does, whose checkpoints say "dynamic" and mean a fixed factor."""
    model = tiny("hunyuan_v1_dense", **NARROW, head_dim=8, rope_parameters={**DYNAMIC, "alpha": 1000.0})
    assert steady_positions(model) is None
    assert not has_position_table(capture(model).graph_module)


def test_a_configuration_that_does_not_say_where_is_refused():
    model = tiny("phi3", **CASES["phi3"])
    del model.config.rope_parameters["original_max_position_embeddings"]
    with pytest.raises(PositionError, match="does not say from"):
        ss.optimize(model)
