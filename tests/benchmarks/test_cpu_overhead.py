"""The benchmark against HuggingFace on a CPU, in small: contestants do the same work, and the figures are of it."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cpu_overhead


def test_contestants_write_the_same_texts():
    model = cpu_overhead.build_model(cpu_overhead.Shape(32, 2, 4, 2, 48, 101))
    case = cpu_overhead.Case(prompts=3, shortest=2, longest=9, new_tokens=5)
    rows = cpu_overhead.measure(model, case, cpu_overhead.CONFIGS, count=1)
    assert [row["engine"] for row in rows] == ["HuggingFace", *cpu_overhead.CONFIGS]
    assert {row["equal_texts"] for row in rows} == {"3 of 3"}
    assert rows[0]["times_huggingface"] == 1
    assert all(row["median_s"] > 0 for row in rows)


def test_prompts_are_ragged_and_padded_on_the_left():
    ids, mask = cpu_overhead.padded_prompts(cpu_overhead.Case(3, 2, 8, 1), vocabulary=50)
    assert mask.sum(1).tolist() == [2, 5, 8]
    assert (mask.diff(dim=1) >= 0).all()
    assert torch.equal(ids > 0, mask > 0)


def test_every_contestant_has_a_turn_a_round():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    seconds, _ = cpu_overhead.rounds(calls, 2)
    assert "".join(turns) == "abcabcabc"
    assert all(len(taken) == 2 for taken in seconds.values())
