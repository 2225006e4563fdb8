"""The guide's script for several GPUs, on two processes of a CPU."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import sparsespec_compile as ss

from ..support.models import tiny
from ..support.tokenizer import letters

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("accelerate") is None, reason="transformers loads parts with accelerate"),
]


def test_the_script_writes_what_one_process_writes(tmp_path):
    tokenizer = letters()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    model = tiny("qwen3", num_attention_heads=8, num_key_value_heads=4)
    model.save_pretrained(tmp_path)

    (code,) = re.findall(r"```python ranks\n(.*?)```", (ROOT / "docs" / "many-gpus.md").read_text(), re.DOTALL)
    script = tmp_path / "shared.py"
    named = code.replace('"Qwen/Qwen3-32B"', repr(str(tmp_path))).replace("torch.bfloat16", "torch.float32")
    script.write_text(f"import sys\nsys.path.append({str(ROOT)!r})\n{named}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr

    chat = [{"role": "user", "content": "How many primes are there below 100?"}]
    sampling = ss.SamplingParams(max_new_tokens=64, temperature=0.6, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (alone,) = ss.optimize(model).generate_batch([chat], sampling, tokenizer=tokenizer)
    assert done.stdout.strip() == alone.text.strip() != ""
    assert "1/1 texts" in done.stderr
