"""A compiled model where transformers expects its own: pipelines, and what evaluation harnesses read."""

import sys

import pytest
import torch
from transformers import GenerationConfig, pipeline
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

import sparsespec_compile as ss
from sparsespec_compile.__main__ import main
from sparsespec_compile.errors import StaleParametersError

from .support.models import tiny
from .support.tokenizer import letters


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def fast(model):
    return ss.optimize(model, ss.SpecConfig(draft_tokens=3, min_budget=6))


@pytest.fixture(scope="module")
def pipes(model, fast):
    return [pipeline("text-generation", model=given, tokenizer=letters(), device="cpu") for given in (model, fast)]


class TestPipeline:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"return_full_text": False},
            {"batch_size": 2},
            {"return_tensors": True},
            {"stop_sequence": "bc"},
            {"generation_config": GenerationConfig(max_new_tokens=5)},
        ],
        ids=str,
    )
    def test_texts_are_those_of_the_model(self, pipes, arguments):
        prompts = ["abcdef", "bababcabab", ""]
        settings = {"do_sample": False, **({} if "generation_config" in arguments else {"max_new_tokens": 9})}
        prompts = prompts[: 2 if "batch_size" in arguments else 3]
        expected, got = (pipe(prompts, **settings, **arguments) for pipe in pipes)
        assert got == expected

    def test_samples_of_a_prompt(self, pipes):
        texts = pipes[1]("abcdef", max_new_tokens=9, num_return_sequences=3)
        assert len({text["generated_text"] for text in texts}) == 3

    def test_it_says_what_it_holds(self, pipes):
        assert "OptimizedModel" in repr(pipes[1])
        assert "text" in repr(pipes[1])


def test_a_command_without_its_extra_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "sparsespec_compile.integrations.serve", raising=False)
    assert main(["serve", "--help"]) == 2
    assert "serve needs typer, which is not installed. Run: pip install" in capsys.readouterr().err


def test_what_harnesses_read(model, fast):
    for name in ("config", "generation_config", "device", "dtype", "name_or_path", "main_input_name"):
        assert getattr(fast, name) == getattr(model, name)
    assert fast.can_generate()
    assert torch.equal(fast(torch.tensor([[3, 4]])).logits, model(torch.tensor([[3, 4]])).logits)
    assert fast.eval() is fast.to("cpu") is fast.to(torch.device("cpu")) is fast
    with pytest.raises(StaleParametersError, match=r"stays on its device, cpu, got to\('meta'\)"):
        fast.to("meta")
    assert fast.spec_config.draft_tokens == 3


def test_generation_settings_that_are_replaced_take_effect(model, fast, monkeypatch):
    monkeypatch.setattr(model, "generation_config", model.generation_config)
    fast.generation_config = GenerationConfig(max_new_tokens=3)
    assert fast.generate(torch.tensor([[3, 4]])).shape == (1, 5)
    assert len(fast.generate_batch([[3, 4]])[0].token_ids) == 3


def test_generate_as_a_harness_calls_it(model, fast):
    ids = torch.tensor([[3, 4, 5]])
    call = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_length": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "use_cache": True,
        "stopping_criteria": StoppingCriteriaList(),
        "logits_processor": LogitsProcessorList(),
        "assistant_model": None,
        "synced_gpus": False,
        "tokenizer": letters(),
    }
    assert torch.equal(fast.generate(**call), model.generate(**call))
