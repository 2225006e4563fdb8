"""Compares the README's figures with the committed results, and names those that are not in them.

    python benchmarks/check_readme.py

Run it after the README or a file of benchmarks/results has changed. It ends with 1 when a figure is another one.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from drafters import markdown
from inflated_shape import preset
from transformers import Qwen3Config

from sparsespec_compile import H200, SpecConfig
from sparsespec_compile.advice.config_cost import config_cost
from sparsespec_compile.advice.prediction import predict_cycle
from sparsespec_compile.runtime.device.drafters import cycles_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
WORDS = " ".join(README.split())

Claim = tuple[str, str]
"""A result file, and what the README is to say of it, with single spaces for all white space."""

KERNEL_ROWS = {
    "plain decoding": "decode 64 x 8192",
    "verifying 9 rows each": "verify 64 x 8192",
    "the same, giving out scores": "verify 64 x 8192, scored",
    "57 of them drafting, 410 pillars a head": "draft 57 x 410 of 8192",
    "57 drafting, 7 verifying, one launch": "mixed 57 drafts + 7 verify",
    "57 drafting, 7 verifying and giving out scores": "mixed, scored",
}


def main() -> None:
    wrong = [(file, text) for file, text in claims() if " ".join(text.split()) not in WORDS]
    for file, text in wrong:
        print(f"{file}: README.md does not say: {text}")
    sys.exit(bool(wrong))


def claims() -> Iterator[Claim]:
    for part in (kernels, flashinfer, throughput, ablation, drafters, idle_and_startup, logit_gap):
        yield from part()


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def kernels() -> Iterator[Claim]:
    """Each case's row; cells have as many decimals as the README gives them."""
    file = "h200-kernels.json"
    cases = {case["name"]: case for case in load(file)["cases"]}
    lines = README.splitlines()
    titles = next(line for line in lines if "SDPA flash |" in line).lower().split("|")[4:-1]
    for row, name in KERNEL_ROWS.items():
        line = next((line for line in lines if line.startswith(f"| {row} |")), None)
        if line is None:
            yield file, f"| {row} |"
            continue
        ms, share, *peers = line.split("|")[2:-1]
        yield file, f"| {row} | {_rounded_as(ms, cases[name]['ms'])} | {cases[name]['share_of_read_ceiling']:.0%} |"
        others = {peer: value for peer, value in cases[name]["peers"].items() if peer != "in turn"}
        cells = ["-"] * len(titles)
        for peer, value in others.items():
            column = max(range(len(titles)), key=lambda place: sum(word in titles[place] for word in peer.split()))
            shown, *rest = peers[column].split(",")
            cells[column] = ",".join([_rounded_as(shown, value), *rest]).strip()
        yield file, f"{ms.strip()} | {share.strip()} | {' | '.join(cells)} |"


def _rounded_as(text: str, value: float) -> str:
    return f"{value:.{len(text.strip().partition('.')[2])}f}"


def flashinfer() -> Iterator[Claim]:
    file = "h200-kernels-flashinfer.json"
    then = {case["name"]: case for case in load(file)["cases"]}
    now = {case["name"]: case for case in load("h200-kernels.json")["cases"]}
    measured = [then[name] for row, name in KERNEL_ROWS.items() if "scores" not in row]
    decode, verify, draft, mixed = map(_flashinfer, measured)
    yield (
        file,
        f"took {decode:.3f}, {verify:.3f}, {draft:.4f} (one list of pillars for all heads) and {mixed:.3f} ms",
    )
    decode, verify, draft, mixed = (case["ms"] for case in measured)
    yield file, f"took {decode:.3f}, {verify:.3f}, {draft:.4f} and {mixed:.3f}."
    for name, digits in (("verify 256 x 1024", 3), ("draft 57 x 410 of 8192, Qwen2.5-7B", 4)):
        values = _flashinfer(then[name]), then[name]["ms"], now[name]["ms"]
        theirs, ours, ours_now = (f"{value:.{digits}f}" for value in values)
        yield file, f"{theirs} then, ours {ours}, and {ours_now} now"


def _flashinfer(case: dict[str, Any]) -> float:
    return next(ms for name, ms in case["peers"].items() if "flashinfer" in name)


def throughput() -> Iterator[Claim]:
    file = "h200-throughput.json"
    rows = load(file)
    ours = {(row["workload"], row["engine"], row["settings"].get("draft_tokens")): row for row in rows}
    table = README.split("<!-- throughput -->")[1].split("<!-- /throughput -->")[0].strip().splitlines()[2:]
    for line in table:
        name = line.split("|")[1].strip()
        workload = f"Qwen3-8B {name}".replace(" x ", "x").replace(", draining", "-drain")
        plain = ours[workload, "plain", None]["tokens_per_second"]
        cells = [name, f"{plain:,.0f}"]
        for drafts in (8, 12, "auto"):
            row = ours.get((workload, "sparsespec", drafts))
            speed = row and row["tokens_per_second"]
            cells += [f"{speed:,.0f}", f"{speed / plain:.2f}"] if speed else ["-", "-"]
        yield file, f"| {' | '.join(cells)} |"
    for drafts in (8, 12):
        accepted = ours["Qwen3-8B 64x8192", "sparsespec", drafts]["accepted_per_cycle"]
        yield file, f"{drafts} drafts {accepted:.2f}"
    slowdown = ours["Qwen3-8B 64x8192", "sparsespec", 12]["ms_per_iteration"] / 1e3 / _light_seconds()
    yield file, f"takes {slowdown:.1f} times as long as its bytes at 4.3 TB/s"
    for size, words in (
        ("64x8192", "at 64 x 8192"),
        ("48x14000", "at 48 x 14000"),
        ("64x1024", "at 64 x 1024"),
        ("1x8192", "with one request"),
        ("64x4096-drain", "where the batch drains"),
    ):
        here = {key[2]: row["tokens_per_second"] for key, row in ours.items() if key[0] == f"Qwen3-8B {size}"}
        yield file, f"{here.pop('auto') / max(here.values()) - 1:+.1%} {words}"
    for engine, sentence in (
        ("hf-generate", "`generate` with a static cache wrote {:.0f} tokens a second in the same run"),
        ("hf-batch", "`generate_batch` wrote {:.0f} tokens a second at 16 x 8192"),
    ):
        (row,) = (row for row in rows if row["engine"] == engine)
        yield file, sentence.format(row["tokens_per_second"])
    yield from _equal_tokens()


def _light_seconds() -> float:
    """Seconds of an iteration of 64 requests that have written half of their tokens, at the speed of light."""
    shape, config = preset("Qwen3-8B"), SpecConfig(draft_tokens=12)
    model = Qwen3Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocabulary,
    )
    cost = config_cost(model, torch.bfloat16)
    return predict_cycle(cost, cycles_of(config)[-1], config.schedule, 8192 + 128, 64, H200).light_seconds


def _equal_tokens() -> Iterator[Claim]:
    file = "h200-throughput.txt"
    result = (RESULTS / file).read_text()
    for workload, pattern in (
        ("64x8192", "[{}](benchmarks/results/h200-throughput.txt)"),
        ("48x14000", "{} of those"),
    ):
        shares = re.findall(rf"{workload}: ([\d.]+%)", result)
        if not any(pattern.format(share) in WORDS for share in shares):
            yield file, pattern.format(" or ".join(shares))


def ablation() -> Iterator[Claim]:
    file = "h200-ablation.json"
    rows = load(file)["rows"]
    for row in rows:
        accepted = row["accepted_per_cycle"]
        cells = (row["stage"], f"{row['tokens_per_second']:,.0f}", f"{row['ms_per_iteration']:.2f}")
        yield file, f"| {' | '.join(cells)} | {f'{accepted:.2f}' if accepted else '-'} |"
    yield file, f"cost {_lost_to_the_host_tier(rows):.1%} there beside a pool"
    file = "h200-ablation-host-tier.json"
    rows = load(file)["rows"]
    tier, pool = (row["tokens_per_second"] for row in rows)
    yield file, f"[costs {_lost_to_the_host_tier(rows):.1%}]"
    yield file, f"({tier:,.0f} and {pool:,.0f} tokens a second)"


def _lost_to_the_host_tier(rows: list[dict[str, Any]]) -> float:
    speeds = {row["stage"]: row["tokens_per_second"] for row in rows}
    return 1 - speeds["+ host tier"] / speeds["pool for all"]


def drafters() -> Iterator[Claim]:
    yield "h200-drafters.json", markdown(load("h200-drafters.json")["rows"])


def idle_and_startup() -> Iterator[Claim]:
    ahead = load("h200-overlap.json")["rows"][0]
    words = f"for {ahead['idle_between_steps']:.1%} of the time, and for {ahead['gpu_idle_share']:.1%}"
    yield "h200-overlap.json", words
    for file, words in (
        ("h200-startup.json", "[{} seconds, {} with caches]"),
        ("h200-startup-other-host.json", "[{} and {}]"),
    ):
        yield file, words.format(*(f"{row['to_first_token_seconds']:.0f}" for row in load(file)["rows"]))


def logit_gap() -> Iterator[Claim]:
    runs = [value for name, value in load("h200-logit-gap.json").items() if name.startswith("temperature")]
    parted, tokens = (sum(run[name] for run in runs) for name in ("parted", "tokens"))
    largest = max(run["largest_gap"] for run in runs)
    words = f"{parted} of {tokens:,} tokens are not the favourite, the largest gap is {largest} logits"
    yield "h200-logit-gap.json", words


if __name__ == "__main__":
    main()
