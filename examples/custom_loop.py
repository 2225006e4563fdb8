"""A decoding loop of your own, made of nothing but replays of a captured step, and `generate` beside it.

Each iteration says what every slot does - a chunk of its prompt, a draft, or the verification of its drafts - and
replays the step. The loop below runs two texts in opposite phases; the device keeps tokens, lengths and pillars.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from countdown.device import usable_device
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsespec_compile as ss

COUNTDOWN = Path(__file__).parent / "countdown" / "model"
PUZZLES = ("solve 21 6 24 2 for 102\n", "solve 39 36 32 40 for 75\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--draft-tokens", type=int, default=8)
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def prompt_work(slot: int, prompt: list[int], draft_tokens: int) -> ss.Work:
    """A whole prompt at once: the logits of its last row give the first token, its last rows choose the pillars."""
    scored = min(draft_tokens + 1, len(prompt))
    return ss.Work(slot, ss.Mode.PREFILL, rows=len(prompt), tokens=prompt, logits=1, scored=scored)


@dataclass
class Cycle:
    """Where a slot is in its cycle: drafts so far, and after how many it verifies."""

    slot: int
    length: int
    drafted: int = 0

    def next_work(self, draft_tokens: int) -> ss.Work:
        """One more draft, or, after the last one, the verification of all of them."""
        if self.drafted < self.length:
            self.drafted += 1
            return ss.Work(self.slot, ss.Mode.DRAFT, rows=1, offset=self.drafted - 1, logits=1)
        rows = self.drafted + 1
        self.length, self.drafted = draft_tokens, 0
        return ss.Work(self.slot, ss.Mode.VERIFY, rows=rows, logits=rows, scored=rows)


def decode(step: ss.CapturedStep, prompts: list[list[int]], new_tokens: int, draft_tokens: int) -> list[list[int]]:
    """Greedy texts of `new_tokens` tokens each."""
    texts: list[list[int]] = [[] for _ in prompts]
    # Shorter first cycles for later slots: so they verify in different iterations, and no iteration reads all caches.
    cycles = [Cycle(slot, draft_tokens // (slot + 1)) for slot in range(len(prompts))]
    for slot, prompt in enumerate(prompts):
        step.begin(slot, max_length=len(prompt) + new_tokens)
    step.fill([prompt_work(slot, prompt, draft_tokens) for slot, prompt in enumerate(prompts)])
    while True:
        results = step.replay().tokens.tolist()
        for text, (count, *tokens) in zip(texts, results, strict=False):
            text.extend(tokens[:count])
        if all(len(text) == new_tokens for text in texts):
            return texts
        step.fill([cycle.next_work(draft_tokens) for cycle in cycles])


def main() -> None:
    arguments = parse_arguments()
    if arguments.max_new_tokens < 1:
        raise SystemExit(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    try:
        run(arguments, Console())
    except ss.SparseSpecError as error:
        raise SystemExit(str(error)) from error


def run(arguments: argparse.Namespace, console: Console) -> None:
    tokenizer = AutoTokenizer.from_pretrained(COUNTDOWN)
    model = AutoModelForCausalLM.from_pretrained(COUNTDOWN, dtype=torch.float32).to(arguments.device).eval()
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=arguments.draft_tokens))
    prompts = tokenizer(list(PUZZLES)).input_ids

    longest = max(map(len, prompts)) + arguments.max_new_tokens
    step = fast.capture(max_requests=len(prompts), max_length=longest)
    texts = decode(step, prompts, arguments.max_new_tokens, arguments.draft_tokens)

    sampling = ss.SamplingParams(max_new_tokens=arguments.max_new_tokens, stop_token_ids=())
    expected = [completion.token_ids for completion in fast.generate_batch(prompts, sampling)]
    console.print(tokenizer.decode(texts[0][:60]), "...")
    console.print(f"texts equal generate's: {'[green]yes' if texts == expected else '[red]no'}")


if __name__ == "__main__":
    main()
