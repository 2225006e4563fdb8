"""Walks every family of transformers' causal-LM registry: is the text of the compiled model HuggingFace's own?

    python benchmarks/breadth.py --json benchmarks/results/breadth.json --markdown benchmarks/results/breadth.md

Each family gets a tiny random float32 model, and another for each kind of checkpoints whose layers or positions its
default configuration lacks (`published.py`). HuggingFace decodes three prompts greedily, each alone; the compiled
model decodes them as one left-padded batch, drafting with few pillars so that drafts are often wrong. Every model
runs in a process of its own, with limits on time and memory, so that none can stop the walk. With `--families` and
`--keep`, some are examined again, and the outcomes of the others are taken over from a file, if it is of the same
versions; the table says how many of them are of another state of the sources.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import resource
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from environment import environment
from published import PUBLISHED, configurations
from tiny_configs import VOCABULARY, tiny_model
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sparsespec_compile as ss

PROMPTS = (5, 23, 14)
NEW_TOKENS = 48
SETTINGS = ss.SpecConfig(draft_tokens=4, budget_ratio=0.05, min_budget=6)
MEMORY = 12 << 30
STATUSES = {
    "equal": "the same text as HuggingFace's, token for token",
    "refused": "`optimize` refuses the model with a named error",
    "no reference": "HuggingFace itself cannot build a small model of the family, or decode text with it alone",
    "differs": "another text",
    "crashed": "an error that is not one of ours, or a limit on time or memory",
}


@dataclass(frozen=True)
class Outcome:
    """What became of one model.

    Attributes:
        family: its family; of a published configuration beside the family's default, the checkpoint behind a slash.
        status: one of STATUSES.
        why: for all but "equal", the error or the first token that differs.
        layers: attention layers, 0 when the model was not compiled.
        accepted: accepted drafts of `SETTINGS.draft_tokens` a cycle, None when nothing was generated.
        distinct: different tokens in the texts.
        stands_for: which checkpoints the configuration stands for, where it is not the default one.
        sources: `sources()` when it was examined.
    """

    family: str
    status: str
    why: str = ""
    layers: int = 0
    accepted: float | None = None
    distinct: int = 0
    stands_for: str = ""
    sources: str = ""


def sources() -> str:
    """A fingerprint of all that an outcome depends on beside the versions: our code, and this script's."""
    root = Path(__file__).resolve().parents[1]
    files = [path for folder in ("kernels", "passes", "sparsespec_compile") for path in root.glob(f"{folder}/**/*.py")]
    files += [root / "benchmarks" / name for name in ("breadth.py", "published.py", "tiny_configs.py")]
    content = b"".join(path.read_bytes() for path in sorted(files))
    return hashlib.sha256(content).hexdigest()[:12]


def examine(family: str) -> Outcome:
    """Builds, decodes, compiles, decodes again, compares. Whatever is raised is an outcome too."""
    try:
        model = tiny_model(family)
    except Exception as error:
        return Outcome(family, "no reference", _first_line(error))
    prompts = _prompts()
    problem, expected = "", None
    try:
        model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
        expected = [_decode(model, prompt) for prompt in prompts]
    except Exception as error:
        problem = _first_line(error)
    try:
        fast = ss.optimize(model, SETTINGS)
        texts = fast.generate(*_left_padded(prompts), max_new_tokens=NEW_TOKENS)[:, max(PROMPTS) :]
    except ss.SparseSpecError as error:
        return Outcome(family, "refused", f"{type(error).__name__}: {error}")
    except Exception:
        return Outcome(family, "crashed", traceback.format_exc()[-1500:])
    layers = len(fast.report.attention)
    if expected is None:
        return Outcome(family, "no reference", problem, layers)
    different = (texts != torch.stack(expected)).nonzero().tolist()
    accepted, distinct = fast.stats.accepted_per_cycle, len(texts.unique())
    if different:
        return Outcome(family, "differs", f"first at prompt, token {different[0]}", layers, accepted, distinct)
    return Outcome(family, "equal", "", layers, accepted, distinct)


def _prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in PROMPTS]


def _decode(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    text = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=NEW_TOKENS, do_sample=False
    )
    new = text[0, len(prompt) :]
    if len(new) != NEW_TOKENS:
        raise RuntimeError(f"{len(new)} tokens came out instead of {NEW_TOKENS}")
    return new


def _left_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    batch = torch.zeros(2, len(prompts), max(PROMPTS), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        batch[0, row, -len(prompt) :] = prompt
        batch[1, row, -len(prompt) :] = 1
    return batch[0], batch[1]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


def _child(family: str, results: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    results.send(examine(family))


class Examination:
    """`examine` of one family in a process of its own.

    The process is forked, so that torch and transformers are imported once. That is safe as long as the parent has
    no other threads, so tqdm's monitor is off.
    """

    def __init__(self, family: str, seconds: float) -> None:
        self.family = family
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        context = multiprocessing.get_context("fork")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(family, sender), daemon=True)
        self.process.start()
        sender.close()

    def outcome(self) -> Outcome | None:
        """The outcome, once there is one or time is up."""
        late = time.monotonic() > self.deadline
        if not self.receiver.poll() and not late:
            return None
        try:
            found = self.receiver.recv() if self.receiver.poll() else self._crash(f"over {self.seconds} s")
        except EOFError:
            self.process.join()
            found = self._crash(f"the process ended with exit code {self.process.exitcode}")
        self.process.kill()
        self.process.join()
        return found

    def _crash(self, why: str) -> Outcome:
        return Outcome(self.family, "crashed", why)


def walk(families: list[str], seconds: float, workers: int) -> list[Outcome]:
    """All models that `families` names, `workers` at a time; the outcomes in their order."""
    tqdm.monitor_interval, state = 0, sources()
    waiting, running, outcomes = list(reversed(families)), [], {}
    with tqdm(total=len(families), desc="families") as progress:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(Examination(waiting.pop(), seconds))
            wait([examination.receiver for examination in running], timeout=1.0)
            for examination in list(running):
                outcome = examination.outcome()
                if outcome is not None:
                    running.remove(examination)
                    outcomes[examination.family] = outcome
                    progress.update()
    notes = {name: one.stands_for for name, one in PUBLISHED.items()}
    return [replace(outcomes[name], stands_for=notes.get(name, ""), sources=state) for name in families]


def kept(file: Path, measured_on: dict, names: list[str], again: list[str]) -> dict[str, Outcome]:
    """The outcomes of `file` for those of `names` that are not examined `again`, by name."""
    result = json.loads(file.read_text(encoding="utf-8"))
    if result["environment"] != measured_on:
        raise SystemExit(f"{file} was made with {result['environment']}, here is {measured_on}: examine all again.")
    found = {one["family"]: Outcome(**one) for one in result["outcomes"] if one["family"] not in again}
    return {name: found[name] for name in names if name in found}


def markdown(outcomes: list[Outcome], measured_on: dict) -> str:
    """The table, with a count of each status in front."""
    families = Counter(outcome.status for outcome in outcomes if "/" not in outcome.family)
    further = Counter(outcome.status for outcome in outcomes if "/" in outcome.family)
    lines = ["# Families of transformers' causal-LM registry", "", _method(outcomes, measured_on), ""]
    lines += [
        f"- **{families[status]} {status}**, and {further[status]} further configurations: {meaning}"
        for status, meaning in STATUSES.items()
    ]
    lines += ["", "| family | result | stands for | attention layers | accepted of 4 | why |", "| --- " * 6 + "|"]
    for outcome in outcomes:
        accepted = f"{outcome.accepted:.2f}" if outcome.accepted is not None else ""
        why = outcome.why.replace("|", "\\|").replace("\n", " ")
        cells = outcome.family, outcome.status, outcome.stands_for, str(outcome.layers or ""), accepted, why
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _method(outcomes: list[Outcome], measured_on: dict) -> str:
    older = sum(outcome.sources != sources() for outcome in outcomes)
    mixed = f" {older} of the outcomes are of an earlier state of the sources." if older else ""
    return (
        f"Tiny random float32 models on CPU, torch {measured_on['torch']}, transformers {measured_on['transformers']}. "
        f"Greedy text of {len(PROMPTS)} prompts, {NEW_TOKENS} tokens each: HuggingFace `generate`, prompt by prompt, "
        f"against one left-padded batch of the compiled model ({SETTINGS.draft_tokens} drafts a cycle, budget "
        f"{SETTINGS.min_budget}). A family with a note, and a checkpoint behind a slash, have the kinds of layers or "
        "positions of published checkpoints, which the family's default configuration lacks. Made by `python "
        f"benchmarks/breadth.py`.{mixed}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", help="which to examine, with their published configurations")
    parser.add_argument("--keep", type=Path, help="a file with outcomes of the others")
    parser.add_argument("--seconds", type=float, default=300.0, help="limit for each family")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the outcomes")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    measured_on = environment("cpu")
    names = configurations(list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    again = configurations(arguments.families) if arguments.families else names
    others = kept(arguments.keep, measured_on, names, again) if arguments.keep else {}
    examined = {outcome.family: outcome for outcome in walk(again, arguments.seconds, arguments.workers)}
    outcomes = [found for name in names if (found := {**others, **examined}.get(name)) is not None]
    table = markdown(outcomes, measured_on)
    print(table)
    if arguments.markdown:
        arguments.markdown.write_text(table, encoding="utf-8")
    if arguments.json:
        result = {"environment": measured_on, "outcomes": [asdict(outcome) for outcome in outcomes]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
