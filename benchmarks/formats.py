"""Quantised weights and PEFT's adapters: is the text of the compiled model that of the model itself, on a CPU?

    pip install '.[formats]' && python benchmarks/formats.py --json benchmarks/results/formats.json

Each format is made of the same tiny random float32 Llama, gpt-oss's own aside. The model itself decodes two prompts
greedily, then the compiled one, with few pillars so that drafts are often wrong.
"""

import argparse
import importlib.metadata
import json
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from environment import environment
from quantised_checkpoints import SIZES, plain
from quantised_models import METHODS

import sparsespec_compile as ss

LENGTHS, NEW_TOKENS = (4, 11), 32
SETTINGS = ss.SpecConfig(draft_tokens=3, min_budget=6)
PACKAGES = (
    "torch",
    "transformers",
    "torchao",
    "peft",
    "bitsandbytes",
    "compressed-tensors",
    "optimum-quanto",
    "gguf",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one format.

    Attributes:
        name: of the format.
        status: "equal": the same text as the model's own, token for token. "refused": `optimize` refuses the model with
            a named error. "no reference": the format's own library does not make or run such a model on this CPU.
            "differs": another text. "crashed": an error that is not one of ours.
        why: for all but "equal".
    """

    name: str
    status: str
    why: str = ""


def with_adapters(kind: str = "LoraConfig", *, merged: bool = False, **settings: Any) -> Any:
    """A PEFT model whose adapters change the text."""
    import peft

    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], **({"r": 4} if kind != "IA3Config" else {})}
    model = peft.get_peft_model(plain(), getattr(peft, kind)(**{**targets, **settings}))
    own = plain().state_dict().keys()
    torch.manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.get_base_model().named_parameters():
            if path.replace("base_layer.", "").replace("original_module.", "") not in own:
                parameter.add_(0.2 * torch.randn_like(parameter))
    if merged:
        model.merge_adapter()
    return model.eval()


def prompt_tuned() -> Any:
    """Learned tokens before the prompt."""
    import peft

    return peft.get_peft_model(plain(), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()


FORMATS: Mapping[str, Callable[[], Any]] = {
    **{name: make for makers in METHODS.values() for name, make in makers.items()},
    "PEFT LoRA": with_adapters,
    "PEFT LoRA, merged": lambda: with_adapters(merged=True),
    "PEFT LoRA, rslora": lambda: with_adapters(use_rslora=True),
    "PEFT LoRA on the embedding": lambda: with_adapters(target_modules=["embed_tokens", "q_proj"]),
    "PEFT LoRA, modules_to_save": lambda: with_adapters(modules_to_save=["embed_tokens", "lm_head"]),
    "PEFT LoRA, trainable_token_indices": lambda: with_adapters(trainable_token_indices=[5, 6, 7]),
    "PEFT DoRA": lambda: with_adapters(use_dora=True),
    "PEFT IA3": lambda: with_adapters("IA3Config", feedforward_modules=["down_proj"]),
    "PEFT LoHa": lambda: with_adapters("LoHaConfig"),
    "PEFT VeRA": lambda: with_adapters("VeraConfig", target_modules=["q_proj", "o_proj"]),
    "PEFT prompt tuning": prompt_tuned,
}


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.zeros(2, len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        batch[0, row, -length:] = torch.randint(3, SIZES["vocab_size"], (length,), generator=generator)
        batch[1, row, -length:] = 1
    return batch[0], batch[1]


def examine(name: str) -> Outcome:
    """Makes a model of a format, decodes, compiles, decodes again, compares."""
    ids, mask = prompts()
    try:
        model = FORMATS[name]()
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        expected = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, -NEW_TOKENS:]
    except Exception as error:
        return Outcome(name, "no reference", f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
    try:
        text = ss.optimize(model, SETTINGS).generate(ids, mask, max_new_tokens=NEW_TOKENS)[:, -NEW_TOKENS:]
    except ss.SparseSpecError as error:
        return Outcome(name, "refused", f"{type(error).__name__}: {error}")
    except Exception:
        return Outcome(name, "crashed", traceback.format_exc()[-1500:])
    different = (text != expected).nonzero().tolist()
    return Outcome(name, "differs" if different else "equal", f"first at {different[0]}" if different else "")


def versions() -> dict[str, str]:
    """Of what makes the models."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--json", type=Path, help="where to write the outcomes")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    outcomes = []
    for name in arguments.formats:
        outcomes.append(examine(name))
        print(outcomes[-1], flush=True)
    if arguments.json:
        result = {"environment": environment("cpu") | versions(), "outcomes": [asdict(one) for one in outcomes]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
