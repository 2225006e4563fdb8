"""The walk over transformers' families: a dozen live, with refusals of every kind, and the committed table."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sparsespec_compile import errors

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "breadth.py"
RESULTS = ROOT / "benchmarks" / "results"

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


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("breadth")
    json_file, table = folder / "breadth.json", folder / "breadth.md"
    command = [sys.executable, SCRIPT, "--families", *EQUAL, *REFUSED, "--json", json_file, "--markdown", table]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    found = {outcome["family"]: outcome for outcome in json.loads(json_file.read_text())["outcomes"]}
    assert all(f"| {family} | {outcome['status']} |" in table.read_text() for family, outcome in found.items())
    return found


@pytest.mark.parametrize("family", EQUAL)
def test_text_is_huggingfaces(outcomes, family):
    outcome = outcomes[family]
    assert outcome["status"] == "equal", outcome["why"]
    assert outcome["layers"] == 4
    assert outcome["distinct"] > 10, "a text of a few tokens proves little"


@pytest.mark.parametrize("family", REFUSED)
def test_refusals_are_named(outcomes, family):
    outcome = outcomes[family]
    assert outcome["status"] == "refused", outcome["why"]
    assert outcome["why"].startswith(REFUSED[family])


def committed():
    return json.loads((RESULTS / "breadth.json").read_text())["outcomes"]


def test_committed_table_has_no_family_that_differs_or_crashes():
    counts = Counter(outcome["status"] for outcome in committed())
    assert counts["equal"] >= 55
    assert not counts["differs"]
    assert not counts["crashed"]
    assert sum(counts.values()) > 150
    names = set(errors.__all__)
    assert all(outcome["why"].split(":")[0] in names for outcome in committed() if outcome["status"] == "refused")


def test_committed_table_is_the_committed_result():
    lines = (RESULTS / "breadth.md").read_text().splitlines()
    rows = [line.split(" | ")[:2] for line in lines if line.startswith("| ") and " --- " not in line][1:]
    assert [(family.removeprefix("| "), status) for family, status in rows] == [
        (outcome["family"], outcome["status"]) for outcome in committed()
    ]
