"""The soak and the picture of the schedules, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / script), "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_soak(tmp_path):
    result = run("soak.py", "--requests", "70", "--slots", "10", "--json", str(tmp_path / "soak.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    outcome = json.loads((tmp_path / "soak.json").read_text())
    assert all(outcome["checks"].values())
    assert outcome["completed"] + outcome["cancelled"] == 70
    assert outcome["cancelled"] > 0
    assert outcome["pages_moved_to_host"] > 40
    assert outcome["texts_compared"] > 20


@pytest.mark.slow
def test_schedules(tmp_path):
    pytest.importorskip("matplotlib", reason="comes with the extra `bench`")
    files = {name: tmp_path / f"schedules.{name}" for name in ("json", "png")}
    arguments = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    result = run("schedules.py", "--requests", "9", "--new-tokens", "30", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["schedule"]: row for row in json.loads(files["json"].read_text())["rows"]}
    assert all(row["texts_equal"] for row in rows.values())
    assert rows["balanced"]["rows_uneven"] < rows["in_phase"]["rows_uneven"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
