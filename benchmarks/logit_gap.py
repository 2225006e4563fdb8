"""Checks a text, token by token, against HuggingFace's own logits: is each token the one that HuggingFace would choose?

    python benchmarks/logit_gap.py --json benchmarks/results/h200-logit-gap.json

In low precision two correct programs can part where two tokens are about equally likely. So the check is this. With e
the error of the difference of two logits, a token that one program prefers can trail the other program's favourite by
up to 2 e in that other's logits, e for each program. HuggingFace's model is run over the whole text once in the checked
precision and once in float32; e is the 99th percentile, over the text, of how far the two runs are apart in the
difference of a row's two best tokens, the only ones that can change places. A token fails if its gap to HuggingFace's
favourite exceeds 2 e. (`sparsespec_compile.audit`, which has no room for a second model, runs the checked precision
twice, in batches of other shapes.) For sampled texts logits are divided by the temperature and carry the same Gumbel
noise that the sampler used.
"""

import argparse
import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from countdown_model import held_out_prompts, load
from environment import environment, usable_device
from torch import Tensor
from transformers import PreTrainedModel

import sparsespec_compile as ss
from sparsespec_compile.runtime.device.sampling import derive_seed
from sparsespec_compile.trial.gaps import in_large_batches, token_gaps


@dataclass(frozen=True)
class GapReport:
    """What the check found in one text.

    Attributes:
        tokens: generated tokens that were checked.
        parted: tokens that are not HuggingFace's favourite.
        error: of the difference of a row's two best logits in the checked precision, 99th percentile.
        largest_gap: of a parted token to the favourite, in HuggingFace's logits.
        failed: tokens with a gap above 2 * error.
    """

    tokens: int
    parted: int
    error: float
    largest_gap: float
    failed: int


def check_text(
    model: PreTrainedModel, exact: PreTrainedModel, text: Tensor, prompt_length: int, temperature: float, seed: int
) -> GapReport:
    """Check the tokens of `text` behind its prompt.

    Args:
        model: HuggingFace's model in the precision that wrote the text.
        exact: the same weights in float32.
        text: int64 [length], without padding.
        prompt_length: tokens that were given.
        temperature: 0.0 = the text is greedy.
        seed: the request's own seed, for sampled texts.
    """
    gaps = token_gaps(
        in_large_batches(model), [in_large_batches(exact)], text, prompt_length, model.dtype, temperature, seed
    )
    error = float(gaps.noise.quantile(0.99))
    failed = int((gaps.gap > 2 * error).sum())
    return GapReport(len(gaps.gap), int((gaps.gap > 0).sum()), error, float(gaps.gap.max()), failed)


def texts_of(output: Tensor, prompts: dict[str, Tensor], eos: int) -> list[tuple[Tensor, int]]:
    """Each row without its padding on the left and behind its end, with its prompt's length."""
    width = prompts["input_ids"].shape[1]
    texts = []
    for row, mask in zip(output, prompts["attention_mask"], strict=True):
        ends = (row[width:] == eos).nonzero()
        stop = width + int(ends[0]) + 1 if len(ends) else len(row)
        start = width - int(mask.sum())
        texts.append((row[start:stop], width - start))
    return texts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--puzzles", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load(arguments.device, getattr(torch, arguments.dtype))
    exact = copy.deepcopy(model).float()
    prompts = held_out_prompts(tokenizer, arguments.puzzles, arguments.device)
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=8))
    result: dict = {"environment": environment(arguments.device), "dtype": arguments.dtype}
    for temperature in (0.0, 0.6):
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        output = fast.generate(
            **prompts, max_new_tokens=arguments.max_new_tokens, seed=arguments.seed, pad_token_id=0, **sampling
        )
        reports = [
            check_text(model, exact, text, length, temperature, derive_seed(arguments.seed, index))
            for index, (text, length) in enumerate(texts_of(output, prompts, model.generation_config.eos_token_id))
        ]
        result[f"temperature {temperature}"] = {
            "tokens": sum(report.tokens for report in reports),
            "parted": sum(report.parted for report in reports),
            "failed": sum(report.failed for report in reports),
            "largest_gap": max(report.largest_gap for report in reports),
            "smallest_error": min(report.error for report in reports),
            "accepted_per_cycle": fast.stats.accepted_per_cycle,
            "texts": [asdict(report) for report in reports],
        }
        summary = {name: value for name, value in result[f"temperature {temperature}"].items() if name != "texts"}
        print(f"temperature {temperature}: {summary}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if any(result[f"temperature {temperature}"]["failed"] for temperature in (0.0, 0.6)):
        raise SystemExit("some tokens are not within the error of HuggingFace's own choice")


if __name__ == "__main__":
    main()
