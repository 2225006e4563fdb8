"""The walk over formats: two that are equal, and one that is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sparsespec_compile as ss
from sparsespec_compile.errors import UnsupportedModelError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "formats.py"

sys.path.insert(0, str(SCRIPT.parent))

pytestmark = pytest.mark.slow
for package in ("torchao", "peft", "compressed_tensors", "bitsandbytes", "optimum.quanto", "gguf"):
    pytest.importorskip(package, reason="needs '.[formats]'")


def test_outcomes(tmp_path):
    wanted = {
        "torchao Float8WeightOnlyConfig": "equal",
        "PEFT LoRA": "equal",
        "PEFT prompt tuning": "refused",
    }
    file = tmp_path / "formats.json"
    subprocess.run([sys.executable, str(SCRIPT), "--json", str(file), "--formats", *wanted], check=True)
    outcomes = {outcome["name"]: outcome for outcome in json.loads(file.read_text())["outcomes"]}
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == wanted
    assert outcomes["PEFT prompt tuning"]["why"].startswith("UnsupportedModelError")


def test_compressed_weights_have_to_be_there():
    from quantised_checkpoints import compressed

    model = compressed("FP8_DYNAMIC")
    with pytest.raises(UnsupportedModelError, match=r"until its first forward pass.*dequantize=True"):
        ss.optimize(model)
