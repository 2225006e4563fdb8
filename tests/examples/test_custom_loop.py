"""The loop of one's own that the README points to."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "custom_loop.py"


@pytest.mark.parametrize("draft_tokens", ["8", pytest.param("3", marks=pytest.mark.slow)])
def test_replays_give_generates_texts(draft_tokens):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--max-new-tokens", "40", "--draft-tokens", draft_tokens]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "texts equal generate's: yes" in result.stdout


@pytest.mark.parametrize(("option", "message"), [("--max-new-tokens", "at least 1, got 0"), ("--draft-tokens", "-1")])
@pytest.mark.slow
def test_numbers_that_make_no_sense_are_refused(option, message):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", option, "0" if "0" in message else "-1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
