"""Tables of the documents are those of the committed results."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import check_readme  # noqa: E402
from check_readme import DOCUMENTS, ROOT, TABLES, in_words, renewed, table  # noqa: E402


@pytest.mark.parametrize("path", [path for pattern in DOCUMENTS for path in ROOT.glob(pattern)], ids=str)
def test_documents_have_the_tables_of_the_results(path):
    text = path.read_text()
    assert renewed(text) == text, "run benchmarks/check_readme.py --write"


def test_tables_stand_between_their_marks():
    text = "a\n<!-- one -->\nold\nolder\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\n"
    wanted = "a\n<!-- one -->\n| x |\n| --- |\n| 1 |\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\n"
    assert renewed(text, {"one": lambda: table(["x"], [["1"]])}) == wanted


def test_every_mark_of_a_document_is_of_a_table():
    known = {f"<!-- {name} -->" for name in TABLES} | {"<!-- test-command -->"}
    for path in (path for pattern in DOCUMENTS for path in ROOT.glob(pattern)):
        marks = {line for line in path.read_text().splitlines() if line.startswith("<!-- ") and "/" not in line}
        assert marks <= known


def test_a_line_for_each_workload_and_share(monkeypatch):
    def row(engine, speed, right, settings, drafts_right=None):
        named = {"workload": "Qwen3-8B 64x50+2950", "engine": engine, "settings": settings, "right": right}
        return {**named, "tokens_per_second": speed, "drafts_right": drafts_right}

    rows = [
        row("plain", 1000.0, 1.0, {"draft_tokens": 0}),
        row("sparsespec", 1500.0, 0.9, {}),
        row("sparsespec", 1400.0, 0.9, {"draft_tokens": 8}, drafts_right=0.89),
        row("sparsespec", 1600.0, 0.9, {"drafter": "ngram", "draft_tokens": 3}, drafts_right=0.4),
        row("sparsespec", 1700.0, 1.0, {}),
    ]
    monkeypatch.setattr(check_readme, "load", lambda name: rows)
    assert check_readme.throughput().splitlines()[2:] == [
        "| 64 x 50, 2,950 more | 89.0% | 1,000 | 1,500 | 1.50 | 1,600 | 1.60 | 3 drafts, ngram |",
        "| 64 x 50, 2,950 more | - | 1,000 | 1,700 | 1.70 | - | - | - |",
    ]
    assert in_words("Qwen3-8B 64x4096+768-drain") == "64 x 4,096, 768 more, draining"


def test_a_family_is_equal_if_all_its_configurations_are(monkeypatch):
    def outcome(family, status, stands_for="", why=""):
        return {"family": family, "status": status, "stands_for": stands_for, "why": why}

    outcomes = [
        outcome("llama", "equal"),
        outcome("llama/Llama-3", "equal", "Llama-3: llama3"),
        outcome("phi3", "equal"),
        outcome("phi3/Phi-9", "refused", "Phi-9: ALiBi", "SomeError: it has ALiBi"),
        outcome("lfm2", "refused", "LFM2: convolutions", "OtherError: it has them"),
    ]
    monkeypatch.setattr(check_readme, "load", lambda name: {"outcomes": outcomes})
    assert check_readme.families_equal() == "llama."
    assert check_readme.families_partly().splitlines()[2:] == ["| phi3 | equal | Phi-9: ALiBi: refused, `SomeError` |"]
    assert check_readme.families_refused().splitlines()[2:] == ["| `OtherError` | lfm2 |"]
