"""Which models look positions up in a table that ends."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from sparsespec_compile.passes.capture.capture import capture
from sparsespec_compile.passes.capture.positions import has_position_table

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
OWN = {"gptj": {"rotary_dim": 4}, "opt": {"ffn_dim": 32}, "gpt2": {}, "llama": {}, "olmoe": {"num_key_value_heads": 2}}


@pytest.mark.parametrize(
    ("family", "ends"), [("gpt2", True), ("opt", True), ("gptj", True), ("llama", False), ("olmoe", False)]
)
def test_learned_positions_are_told_from_rotary_ones(family, ends):
    config = AutoConfig.for_model(family, **SIZES, **OWN[family])
    captured = capture(AutoModelForCausalLM.from_config(config).eval())
    assert has_position_table(captured.graph_module) == ends
