"""The walk over transformers' families: a few live and a refusal of every kind, or a dozen and all refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "breadth.py"
sys.path.insert(0, str(SCRIPT.parent))

import breadth  # noqa: E402

EQUAL = (
    "cohere2",
    "deepseek_v3",
    "deepseek_v3/DeepSeek-V3",
    "exaone4",
    "exaone4/EXAONE-4.0-1.2B",
    "gemma2",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite_swa",
    "llama4_text",
    "mixtral",
    "olmoe",
    "opt",
    "qwen3_moe",
    "starcoder2",
    "starcoder2/starcoder2-3b",
)
REFUSED = {
    "bart": "EncoderDecoderError",
    "bloom": "UnsupportedAttentionError",
    "lfm2": "RowMixingError",
    "mamba": "RowMixingError",
    "minimax_m3_vl_text": "UnsupportedAttentionError",
    "qwen3_next": "RowMixingError",
    "rwkv": "AttentionInterfaceError",
}


@pytest.mark.parametrize(
    ("equal", "refused"),
    [
        pytest.param(("cohere2", "gpt_neox"), ("bart", "bloom", "lfm2", "mamba", "rwkv"), id="few"),
        pytest.param(EQUAL, REFUSED, id="all", marks=pytest.mark.slow),
    ],
)
def test_text_is_huggingfaces_or_the_refusal_is_named(equal, refused, tmp_path):
    json_file, table = tmp_path / "breadth.json", tmp_path / "breadth.md"
    families = [name for name in [*equal, *refused] if "/" not in name]
    _walk("--families", *families, "--json", json_file, "--markdown", table)
    outcomes = json.loads(json_file.read_text())["outcomes"]
    assert sorted(outcome["family"] for outcome in outcomes) == sorted([*equal, *refused])
    for outcome in outcomes:
        family = outcome["family"]
        assert f"| {family} | {outcome['status']} |" in table.read_text()
        if family in refused:
            assert outcome["status"] == "refused", (family, outcome["why"])
            assert outcome["why"].startswith(REFUSED[family]), (family, outcome["why"])
            if family == "lfm2":
                assert outcome["stands_for"] == "LFM2-1.2B: convolutions and attention"
        else:
            assert outcome["status"] == "equal", (family, outcome["why"])
            assert outcome["layers"] == 4, family
            assert bool(outcome["stands_for"]) == ("/" in family)
            assert outcome["distinct"] > 10, "a text of a few tokens proves little"


def test_a_family_is_examined_again_beside_the_outcomes_of_others(tmp_path, monkeypatch):
    """What an examination finds is made up."""
    examined = []

    def walk(families, seconds, workers):
        examined.append(families)
        return [breadth.Outcome(family, "refused", f"look {len(examined)}", sources="now") for family in families]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["breadth.py", *map(str, arguments)])
        breadth.main()

    monkeypatch.setattr(breadth, "walk", walk)
    monkeypatch.setattr(breadth, "sources", lambda: "now")
    json_file, table = tmp_path / "breadth.json", tmp_path / "breadth.md"
    run("--families", "bart", "lfm2", "--json", json_file)
    result = json.loads(json_file.read_text())
    bart, lfm2 = result["outcomes"]
    result["outcomes"] = [{**bart, "sources": "older", "why": "kept"}, {**lfm2, "sources": "older", "why": "dropped"}]
    json_file.write_text(json.dumps(result))
    run("--families", "lfm2", "--keep", json_file, "--json", json_file, "--markdown", table)
    kept, again = json.loads(json_file.read_text())["outcomes"]
    assert kept == {**bart, "sources": "older", "why": "kept"}
    assert again == {**lfm2, "why": "look 2"}
    assert [list(families) for families in examined] == [["bart", "lfm2"], ["lfm2"]]
    assert "1 of the outcomes are of an earlier state" in table.read_text()
    result["environment"]["transformers"] = "another"
    json_file.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="examine all again"):
        run("--families", "lfm2", "--keep", json_file)


def _walk(*arguments):
    subprocess.run([sys.executable, SCRIPT, *arguments], check=True, capture_output=True, timeout=900)
