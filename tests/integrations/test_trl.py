"""TRL's own trainers on an equipped model: weights take effect at once, rewards rise, memory is given back.

The toy task rewards tokens of the lower half of the vocabulary, which a random model writes half of the time.
"""

import pytest
import torch
from transformers import GenerationConfig

import sparsespec_compile as ss
from sparsespec_compile.integrations.transformers import Installation

from ..support.models import VOCABULARY, tiny
from ..support.tokenizer import letters

pytestmark = pytest.mark.slow
trl = pytest.importorskip("trl", reason="needs '.[trl]'")
datasets = pytest.importorskip("datasets", reason="needs '.[trl]'")

STEPS = 20
PROMPTS = ["abcdef", "bababc", "cdcdcd", "adaeaf"]


def lower_half(completion_ids, **columns):
    return [sum(token < VOCABULARY // 2 for token in ids) / len(ids) for ids in completion_ids]


def tokenizer():
    tokenizer = letters()
    tokenizer.eos_token = "ab"
    return tokenizer


def settings_of(folder, **settings):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,
        "num_generations": 8,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "beta": 0.0,
        **settings,
    }


def dataset():
    return datasets.Dataset.from_dict({"prompt": PROMPTS * 20})


def trainer_of(kind, model, folder, peft_config=None, **settings):
    settings = {"use_transformers_continuous_batching": True, **settings_of(folder, **settings)}
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(**settings),
        reward_funcs=lower_half,
        train_dataset=dataset(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def lora(**settings):
    peft = pytest.importorskip("peft", reason="needs '.[trl]'")
    return peft.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.1, **settings)


CASES = {
    "GRPO": ("GRPO", lambda: {}),
    "RLOO": ("RLOO", lambda: {}),
    "GRPO, adapters with dropout": ("GRPO", lambda: {"peft_config": lora()}),
    "GRPO, bf16 under Accelerate's autocast": ("GRPO", lambda: {"bf16": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_rewards_rise(case, tmp_path, monkeypatch):
    kind, settings = CASES[case]
    # Adapters leave the output layer as it is, which must be able to prefer a token.
    model = tiny("qwen3", num_hidden_layers=1, initializer_range=0.3 if "adapters" in case else 0.05)
    rollouts, memory = [], []
    generate_batch = Installation.generate_batch

    def watched(self, *args, **arguments):
        outputs = generate_batch(self, *args, **arguments)
        assert not model.training  # the trainer puts it back
        rollouts.append(outputs)
        memory.append(self.fast.memory_plan)
        return outputs

    monkeypatch.setattr(Installation, "generate_batch", watched)
    installation = ss.install(model, ss.SpecConfig(draft_tokens=2, min_budget=8))
    trainer = trainer_of(kind, model, tmp_path, **settings())
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == len(rollouts) == STEPS
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert memory == [None] * STEPS  # given back after each
    assert all(len(outputs) == 16 for outputs in rollouts)
    assert installation.fast.spec_config.memory_fraction == 0.5  # what TRL asks for
    if "bf16" not in case:
        model.eval()
        check_the_weights_are_in_use(model)


def check_the_weights_are_in_use(model):
    """The text after the last step is that of the model as it is now."""
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    for prompt in tokenizer()(PROMPTS).input_ids:
        (output,) = model.generate_batch([prompt], generation_config=GenerationConfig(**settings)).values()
        with torch.no_grad():
            expected = model.generate(torch.tensor([prompt]), use_cache=True, **settings)[0, len(prompt) :].tolist()
        assert output.generated_tokens == expected
