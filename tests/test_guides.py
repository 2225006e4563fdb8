"""Every snippet of the guides runs, in the order in which a reader meets them, on a small model that is at hand."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsespec_compile as ss

from .support.models import tiny
from .support.tokenizer import letters

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def chatting(*_, **__):
    tokenizer = letters()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return tokenizer


@pytest.fixture
def any_name_is_a_small_model(monkeypatch):
    """There is no hub, and no GPU: the names and devices of the guides stand for what there is."""
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny("qwen3", max_position_embeddings=32768)
    )
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", chatting)


@pytest.mark.slow
@pytest.mark.parametrize("guide", [path for path in GUIDES if snippets(path.read_text())], ids=lambda path: path.name)
def test_snippets_run(guide, any_name_is_a_small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    names = {"__name__": "guide"}
    for number, code in enumerate(snippets(guide.read_text())):
        shorter = code.replace("max_new_tokens=8192", "max_new_tokens=32")
        with torch.random.fork_rng():
            exec(compile(shorter, f"{guide.name}, snippet {number + 1}", "exec"), names)


def test_every_error_is_in_the_guide_and_every_one_in_the_guide_exists():
    text = (DOCS / "errors.md").read_text()
    named = set(re.findall(r"`(\w+(?:Error|Warning))`", text))
    public = {name for name in vars(ss.errors) if name.endswith(("Error", "Warning"))}
    assert named == public - {"SparseSpecError"}
