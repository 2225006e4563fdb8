"""The snippets of the guide that need other packages run."""

import re
from pathlib import Path

import pytest

import sparsespec_compile as ss

from ..support.models import tiny

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def snippet(package, guide="rollouts-evaluation-serving.md"):
    (code,) = re.findall(rf"```python {package}\n(.*?)```", (ROOT / "docs" / guide).read_text(), re.DOTALL)
    return code


def test_trl(tmp_path):
    trl = pytest.importorskip("trl", reason="needs '.[trl]'")
    from .test_trl import dataset, lower_half, settings_of, tokenizer

    names = {
        "ss": ss,
        "model": tiny("qwen3", num_hidden_layers=1, initializer_range=0.05),
        "GRPOTrainer": trl.GRPOTrainer,
        "GRPOConfig": trl.GRPOConfig,
        "settings": settings_of(tmp_path, max_steps=2),
        "reward": lower_half,
        "prompts": dataset(),
        "tokenizer": tokenizer(),
    }
    exec(snippet("trl"), names)
    assert names["trainer"].state.global_step == 2


def test_lm_eval(tmp_path):
    pytest.importorskip("lm_eval", reason="needs '.[eval]'")
    from .test_evaluation import tokenizer, toy_task

    tasks = toy_task([{"question": "abcdef", "answer": "no"}], tmp_path)
    names = {"ss": ss, "model": tiny("qwen3", num_hidden_layers=1), "tokenizer": tokenizer(), "tasks": tasks}
    exec(snippet("lm_eval"), names)
    assert names["results"]["results"]["toy"]["exact_match,none"] == 0


def test_ray():
    ray = pytest.importorskip("ray", reason="needs '.[ray]'")
    code = snippet("ray", "many-gpus.md")
    for there, here in {
        '"Qwen/Qwen3-8B", 8': f"{str(ROOT / 'examples' / 'countdown' / 'model')!r}, 1",
        'dtype=torch.bfloat16, device_map="cuda"': "dtype=torch.float32",
        "num_gpus=1": "num_gpus=0",
    }.items():
        assert there in code
        code = code.replace(there, here)
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    names = {"__name__": "guide"}
    try:
        exec(code, names)
        rows = names["texts"].take_all()
    finally:
        ray.shutdown()
    assert {row["id"] for row in rows if row["text"] and row["error"] is None} == {*range(32)}
