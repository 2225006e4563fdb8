"""A model that changes between `optimize` and a generation: the graph follows, or the call is refused."""

import pytest
import torch

import sparsespec_compile as ss
from sparsespec_compile.errors import StaleParametersError, TrainingModeError

from .support.models import left_padded, tiny

NEW = 16
IDS, MASK = left_padded(4, 11)
PARAMS = ss.SamplingParams(max_new_tokens=NEW)


def expected_text(model):
    return model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False)


@pytest.fixture(scope="module")
def trained():
    """A model as a trainer leaves it before a rollout."""
    model = tiny("llama", num_hidden_layers=1)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(IDS, output_hidden_states=True)
    return model.train()


@pytest.fixture(scope="module")
def fast(trained):
    return ss.optimize(trained, ss.SpecConfig(draft_tokens=3, min_budget=6))


def every_way(fast):
    """Each way to begin a generation."""
    return [
        lambda: fast.generate(IDS, MASK, max_new_tokens=NEW),
        lambda: fast.generate_batch([[5, 6]], PARAMS),
        lambda: list(fast.stream([[5, 6]], PARAMS)),
        lambda: list(fast.as_completed([[5, 6]], PARAMS)),
        lambda: fast.capture(max_requests=2, max_length=32),
    ]


@pytest.mark.filterwarnings("ignore")
def test_training_around_rollouts_does_no_harm(trained, fast):
    assert torch.equal(fast.generate(IDS, MASK, max_new_tokens=NEW), expected_text(trained.eval()))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    for _ in range(2):
        trained.train()
        trained(IDS, labels=IDS, output_hidden_states=True).loss.backward()
        optimizer.step()
        trained.gradient_checkpointing_disable()
        trained.disable_input_require_grads()
        text = fast.generate(IDS, MASK, max_new_tokens=NEW)
        assert torch.equal(text, expected_text(trained.eval()))
        trained.gradient_checkpointing_enable()
        trained.enable_input_require_grads()
    for begin in every_way(fast):
        begin()


def test_what_the_graph_does_not_follow_is_refused_until_it_is_undone(trained, fast):
    attention = trained.model.layers[0].self_attn
    text, scaling = fast.generate(IDS, MASK, max_new_tokens=NEW), attention.scaling
    attention.scaling = 4 * scaling
    assert not torch.equal(text, expected_text(trained))
    for begin in every_way(fast):
        with pytest.raises(StaleParametersError, match=r"model\.layers\.0\.self_attn\.scaling was .* now"):
            begin()
    attention.scaling = scaling
    assert torch.equal(fast.generate(IDS, MASK, max_new_tokens=NEW), text)
    with fast.stream([[5, 6]], PARAMS) as stream:
        attention.scaling = 4 * scaling
        with pytest.raises(StaleParametersError, match="scaling"):
            stream.add([[5, 6]], PARAMS)
        attention.scaling = scaling
        assert stream.add([[5, 6]], PARAMS) == [1]
    attention.attention_dropout = 0.5
    trained.train()
    for begin in every_way(fast):
        with pytest.raises(TrainingModeError, match=r"attention_dropout=0\.5"):
            begin()
    trained.eval()
    assert torch.equal(fast.generate(IDS, MASK, max_new_tokens=NEW), text)
    attention.attention_dropout = 0.0
