"""The loop of one's own that the README points to."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "custom_loop.py"


@pytest.mark.parametrize("draft_tokens", ["8", "3"])
def test_replays_give_generates_texts(draft_tokens):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--max-new-tokens", "40", "--draft-tokens", draft_tokens]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "texts equal generate's: yes" in result.stdout
