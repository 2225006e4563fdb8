"""The start-up benchmark on a CPU, with the Countdown model at its own size."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

STARTUP = Path(__file__).parents[2] / "benchmarks" / "startup.py"
sys.path.insert(0, str(STARTUP.parent))

import startup  # noqa: E402


@pytest.mark.slow
def test_starts_with_empty_and_with_filled_caches(tmp_path):
    file = tmp_path / "startup.json"
    command = [sys.executable, str(STARTUP), "--shape", "countdown", "--device", "cpu", "--requests", "2"]
    result = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["caches"] for row in rows] == ["empty", "filled"]
    for row in rows:
        assert 0 < row["optimize_seconds"] < row["to_first_token_seconds"] < row["to_last_token_seconds"]
        assert row["process_to_first_token_seconds"] > row["to_first_token_seconds"]
        assert "first_token_at" not in row


def test_each_start_has_the_caches_it_is_given(monkeypatch, tmp_path):
    given = {}

    def run(command, env, **_):
        given.update({name: env[name] for name in startup.CACHES})
        return subprocess.CompletedProcess(
            command, 0, stdout=f'progress\n{{"optimize_seconds": 1.5, "first_token_at": {time.time() + 7}}}\n'
        )

    monkeypatch.setattr(startup.subprocess, "run", run)
    seconds = startup.start_apart(tmp_path)
    assert seconds == {"optimize_seconds": 1.5, "process_to_first_token_seconds": pytest.approx(7, abs=0.1)}
    assert len(given) == 3
    assert all(Path(folder).parent == tmp_path for folder in given.values())
