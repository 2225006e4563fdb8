"""The walk over transformers' families: a few live and a refusal of every kind, or a dozen and all refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "breadth.py"

EQUAL = (
    "cohere2",
    "deepseek_v3",
    "exaone4",
    "gemma2",
    "glm4",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "olmoe",
    "opt",
    "qwen3_moe",
    "starcoder2",
)
REFUSED = {
    "bart": "EncoderDecoderError",
    "bloom": "UnsupportedAttentionError",
    "gpt_oss": "UnsupportedAttentionError",
    "llama4_text": "UnsupportedAttentionError",
    "mamba": "RowMixingError",
    "qwen3_next": "RowMixingError",
    "rwkv": "AttentionInterfaceError",
}


@pytest.mark.parametrize(
    ("equal", "refused"),
    [
        pytest.param(("cohere2", "gpt_neox"), ("bart", "bloom", "mamba", "rwkv"), id="few"),
        pytest.param(EQUAL, REFUSED, id="all", marks=pytest.mark.slow),
    ],
)
def test_text_is_huggingfaces_or_the_refusal_is_named(equal, refused, tmp_path):
    json_file, table = tmp_path / "breadth.json", tmp_path / "breadth.md"
    command = [sys.executable, SCRIPT, "--families", *equal, *refused, "--json", json_file, "--markdown", table]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    outcomes = json.loads(json_file.read_text())["outcomes"]
    assert sorted(outcome["family"] for outcome in outcomes) == sorted([*equal, *refused])
    for outcome in outcomes:
        family = outcome["family"]
        assert f"| {family} | {outcome['status']} |" in table.read_text()
        if family in refused:
            assert outcome["status"] == "refused", (family, outcome["why"])
            assert outcome["why"].startswith(REFUSED[family]), (family, outcome["why"])
        else:
            assert outcome["status"] == "equal", (family, outcome["why"])
            assert outcome["layers"] == 4, family
            assert outcome["distinct"] > 10, "a text of a few tokens proves little"
