"""The ablation in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from texts import common_share  # noqa: E402


@pytest.mark.slow
def test_stages_write_the_same_texts(tmp_path):
    file = tmp_path / "ablation.json"
    sizes = {"requests": 4, "max-requests": 3, "max-new-tokens": 40, "pool-tokens": 112, "host-pool-tokens": 2048}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    stages = ["--stage", "plain", "+ in groups", "+ host tier", "pool for all"]
    command = [sys.executable, str(BENCHMARKS / "ablation.py"), "--device", "cpu", *arguments, "--json", str(file)]
    result = subprocess.run([*command, *stages], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["stage"] for row in rows[-2:]] == ["+ host tier", "pool for all"]
    assert all(row["texts_equal"] == 1.0 for row in rows)
    assert [row["tokens"] for row in rows] == [rows[0]["tokens"]] * 4
    assert rows[-2]["pages_offloaded"] > 0
    assert not any(row["pages_offloaded"] for row in rows if row["stage"] != "+ host tier")


def test_texts_agree_up_to_the_first_difference():
    assert common_share([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == pytest.approx(4 / 6)
    assert common_share([[1, 2]], [[1, 2]]) == 1.0
