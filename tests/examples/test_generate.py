"""The README's first command, on a short text."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples" / "generate.py"), "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_solves_a_puzzle_and_compares_with_plain_decoding():
    result = run("--max-new-tokens", "60")
    assert result.returncode == 0, result.stderr
    assert "solve " in result.stdout
    assert "text equals plain decoding's: yes" in result.stdout
    for line in ("tokens", "accepted of 8 drafts", "full-attention passes saved", "KV bytes read", "time"):
        assert line in result.stdout


@pytest.mark.slow
def test_takes_a_prompt_of_ones_own_greedily():
    prompt = "solve 3 8 12 25 for 97\n"
    result = run("--prompt", prompt, "--temperature", "0", "--max-new-tokens", "40", "--draft-tokens", "3")
    assert result.returncode == 0, result.stderr
    assert "text equals plain decoding's: yes" in result.stdout
    assert "answer:" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("--draft-tokens", "auto", "--drafter", "auto"), "drafts as auto chose them"),
        (("--drafter", "ngram", "--draft-tokens", "3"), "accepted of 3 drafts"),
    ],
)
def test_takes_the_settings(settings, says):
    result = run("--max-new-tokens", "24", *settings)
    assert result.returncode == 0, result.stderr
    assert "text equals plain decoding's: yes" in result.stdout
    assert says in " ".join(result.stdout.split())


@pytest.mark.slow
def test_says_what_is_wrong_with_an_argument():
    result = run("--draft-tokens", "99", "--max-new-tokens", "5")
    assert result.returncode != 0
    assert result.stderr.strip().endswith('draft_tokens must be an integer from 0 to 64 or "auto", got 99.')
    assert "Traceback" not in result.stderr
