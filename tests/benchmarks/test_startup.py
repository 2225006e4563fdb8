"""The start-up benchmark on a CPU, with the Countdown model at its own size."""

import json
import subprocess
import sys
from pathlib import Path

STARTUP = Path(__file__).parents[2] / "benchmarks" / "startup.py"


def test_starts_with_empty_and_with_filled_caches(tmp_path):
    file = tmp_path / "startup.json"
    command = [sys.executable, str(STARTUP), "--shape", "countdown", "--device", "cpu", "--requests", "2"]
    result = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["caches"] for row in rows] == ["empty", "filled"]
    for row in rows:
        assert 0 < row["optimize_seconds"] < row["to_first_token_seconds"] < row["to_last_token_seconds"]
