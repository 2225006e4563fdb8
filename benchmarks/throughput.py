"""Tokens a second at the shape of a large model, ours beside other engines, on the same texts and the same card.

    python benchmarks/throughput.py --shape Qwen3-8B --workload 64x8192 64x8192@0.95 48x14000 64x50+2950 \
        --settings default draft_tokens=12 drafter=ngram,draft_tokens=3

The weights are the trained Countdown model's, inflated to the shape without changing its function (`inflate.py`): texts
and acceptance are a trained model's, bytes and operations the large one's. Mixtures have random weights
(`random_shapes.py`): only their times count. `workloads.py` says how workloads are written; 64x8192 decodes 64 requests
that have 8,192 tokens of real reasoning each. Prompts and warm-up are outside the clock, which runs while all of them
decode, or, where a batch drains, to the end of the last.

The Countdown model's drafts are nearly always right. `--right 0.95`, or @0.95 behind a workload, spoils all but that
share of the drafts that the model makes, so that tables show speed as a function of acceptance. The text stays the
same, and n-gram drafts, which come from it, are not changed. What a share means exactly is said in `wrong_drafts.py`;
a row's `drafts_right` is what was measured.

Settings are for all workloads, or, as in 64x8192:draft_tokens=12, for one. One process measures all of them: the model
is compiled once, and K/V of prompts are computed once for all settings, as far as the pool holds them together
(`throughput_ours.py`). A row is the median of `--runs` runs, in which the engine is kept. Every engine gets the same
prompts, seeds and number of new tokens. Results go to one JSON list, a row for each engine, settings and workload.

Under `torchrun --nproc-per-node N` the ranks share the model (tensor parallelism), and rank 0 writes the rows.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from countdown_model import load as load_countdown
from environment import environment, usable_device
from inflate import inflated_model
from inflated_shape import PRESETS, preset
from kept_prompts import KeptPrompts
from random_shapes import SHAPES, random_model
from report import label
from rich.console import Console
from rich.table import Table
from texts import common_share
from throughput_ours import Group, Ours, release_memory
from throughput_peers import PEERS, EngineMissingError, PeerFailedError, checkpoint_exists, hf_batch_settings, versions
from traces import recorded_traces
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from workloads import Load, Measured, Workload, workload

import sparsespec_compile as ss

PLAIN = {"draft_tokens": 0}
"""Settings of the engine called "plain"."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-8B", choices=["countdown", *PRESETS, *SHAPES])
    parser.add_argument("--workload", nargs="+", default=["64x8192"], help="requests x cached tokens, see workloads.py")
    parser.add_argument("--engine", nargs="+", default=["plain", "sparsespec"], choices=["plain", "sparsespec", *PEERS])
    parser.add_argument(
        "--settings", type=settings_of, nargs="+", default=[(None, {})], help="of SpecConfig, of all workloads or one"
    )
    parser.add_argument(
        "--right", type=float, nargs="+", default=[1.0], help="shares of drafts left alone, for workloads without @"
    )
    parser.add_argument("--new-tokens", type=int, default=256, help="of each text, for workloads without +")
    parser.add_argument("--runs", type=int, default=1, help="of which the median counts")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of a row's runs, after which no further one begins"
    )
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pool-tokens", type=int, default=720_000, help="of prompts that are kept together, at most")
    parser.add_argument("--idle", action="store_true", help="trace how long the GPU is idle, too")
    parser.add_argument("--checkpoint", type=Path, help="the same model on disk (inflate.py), for vllm")
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write, or add, the rows")
    return parser.parse_args()


def settings(text: str) -> dict[str, Any]:
    """Fields of `SpecConfig`, written name=value,name=value; "default" is none."""
    if text == "default":
        return {}
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{text!r}: write default, or name=value,name=value.")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    try:
        ss.SpecConfig(**found)
    except ss.SparseSpecError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return found


def settings_of(text: str) -> tuple[str | None, dict[str, Any]]:
    """A workload's name and `settings` behind a colon; None = they are for all workloads."""
    name, colon, rest = text.rpartition(":")
    return (name if colon else None), settings(rest)


def ranks() -> int:
    """Processes that share the model: as many as torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks(device: str) -> None:
    """Join the other ranks, if there are any, on a GPU of this rank's own. Only rank 0 goes on printing."""
    if ranks() == 1:
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """Those asked for, without a share of their own once for each of `--right`."""
    found: dict[Workload, None] = {}
    for right in arguments.right:
        if not 0 <= right <= 1:
            raise SystemExit(f"--right {right}: give shares from 0 to 1.")
    for name in arguments.workload:
        one = workload(name, arguments.new_tokens)
        found.update(dict.fromkeys([one] if "@" in name else map(one.at, arguments.right)))
    return list(found)


def load_model(shape: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The Countdown model, or one of another shape, which takes a GPU: it inflated, or random weights."""
    if shape != "countdown" and not device.startswith("cuda"):
        raise SystemExit(f"--shape {shape} takes a GPU, got --device {device}: there, use --shape countdown.")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model, tokenizer = load_countdown(device, dtype)
    if shape == "countdown":
        return model, tokenizer
    return (random_model if shape in SHAPES else _inflated)(shape, device, dtype), tokenizer


def _inflated(shape: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    return inflated_model(preset(shape), device, dtype)


def loads(
    asked: Iterable[Workload], tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> dict[Workload, Load]:
    """What each workload asks for. Those of one length share prompts, as far as each has them."""
    asked, found = list(asked), {}
    for length in dict.fromkeys(one.length for one in asked):
        alike = [one for one in asked if one.length == length]
        prompts = recorded_traces(tokenizer, max(one.requests for one in alike), length, arguments.seed)
        for one in alike:
            given = prompts[: one.requests]
            found[one] = Load(given, one.new_tokens, arguments.temperature, arguments.seed, one.drains)
    return found


def groups(asked: Iterable[Workload], given: dict[Workload, Load], pool_tokens: int) -> Iterator[Group]:
    """Workloads, in their order, as many at a time as a pool of so many tokens holds the prompts and texts of."""
    page_size = ss.SpecConfig().page_size

    def group(members: list[Workload]) -> Group:
        prompts = KeptPrompts((prompt for one in members for prompt in given[one].prompts), page_size)
        return Group(tuple(members), given, prompts)

    members: list[Workload] = []
    for one in asked:
        if members and group([*members, one]).pool_tokens > pool_tokens:
            yield group(members)
            members = []
        members.append(one)
    yield group(members)


class Results:
    """Rows, written to a file as they come, and the texts of plain decoding, with which others are compared."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self.rows: list[dict[str, Any]] = []
        self.missing: list[str] = []
        self._arguments = arguments
        self._console = console
        self._plain: dict[str, list[list[int]]] = {}
        self._began = time.perf_counter()

    def add(self, one: Workload, engine: str, settings: dict[str, Any], measured: Measured | Exception) -> None:
        """A row, or why there is none."""
        if isinstance(measured, Exception):
            self.missing.append(f"{one.name}, {engine} {settings}: {type(measured).__name__}: {measured}")
            self._console.print(f"[yellow]{self.missing[-1]}", soft_wrap=True)
            return
        row = row_of(f"{self._arguments.shape} {one.base}", engine, settings, one.right, measured, self._arguments)
        if engine == "plain" and measured.texts is not None:
            self._plain[one.base] = measured.texts
        elif measured.texts is not None and one.base in self._plain:
            row["equal_to_plain"] = round(common_share(measured.texts, self._plain[one.base]), 5)
            share = f"{one.name}: {row['equal_to_plain']:.1%} of the tokens of {label(row)} equal plain decoding's"
            self._console.print(share, soft_wrap=True)
        self.rows.append(row)
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        seconds = time.perf_counter() - self._began
        self._console.print(f"{seconds:.0f} s: {one.name}: {label(row)}: {speed}", soft_wrap=True)
        _write(self._arguments.json, self.rows)


def row_of(
    workload: str,
    engine: str,
    settings: dict[str, Any],
    right: float,
    measured: Measured,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    numbers = {name: _rounded(value) for name, value in asdict(measured).items() if name != "texts"}
    now = datetime.now(UTC).date().isoformat()
    where = {"hardware": environment(arguments.device)["hardware"], "date": now} | versions(engine)
    kept = {"right": right, "equal_to_plain": None} | ({"ranks": ranks()} if ranks() > 1 else {})
    return {"workload": workload, "engine": engine, "settings": settings, **kept, **numbers, "versions": where}


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def run_ours(arguments: argparse.Namespace, asked: list[Workload], given: dict[Workload, Load], ours: Ours) -> Iterator:
    """Measure every workload with every settings; gives the arguments of `Results.add`."""
    variants = [("plain", PLAIN, None)] if "plain" in arguments.engine else []
    if "sparsespec" in arguments.engine:
        named = [(chosen, name) for name, chosen in arguments.settings]
        different = [chosen for nth, (chosen, _) in enumerate(named) if chosen not in [one for one, _ in named[:nth]]]
        for chosen in different:
            variants.append(("sparsespec", chosen, {name for one, name in named if one == chosen}))
    for group in groups(asked, given, arguments.pool_tokens):
        for engine, chosen, names in variants:
            for spoiled in (False, True):
                members = [one for one in group.workloads if (one.right < 1) == spoiled]
                if names is None:  # plain decoding makes no drafts
                    at_once = {one.base: one.at(1.0) for one in group.workloads}
                    members = [] if spoiled else list(at_once.values())
                elif None not in names:
                    members = [one for one in members if one.name in names]
                started = False
                for one in members:
                    try:  # what fails leaves the others to be measured
                        if not started:
                            ours.start(chosen, group, spoiled=spoiled)
                            started = True
                        measured = ours.measure(
                            one, group, runs=arguments.runs, seconds=arguments.seconds, idle=arguments.idle
                        )
                    except (ss.SparseSpecError, torch.OutOfMemoryError) as error:
                        yield one, engine, chosen, error
                    else:
                        yield one, engine, chosen, measured
        ours.close()


def run_peers(
    arguments: argparse.Namespace, given: dict[Workload, Load], model: PreTrainedModel, console: Console
) -> Iterator:
    """Measure other engines; gives the arguments of `Results.add`."""
    engines = [engine for engine in arguments.engine if engine in PEERS]
    for one in dict.fromkeys(asked.at(1.0) for asked in given):
        for engine in engines:
            if one.drains:
                console.print(f"[yellow]{engine} skipped: {one.name} needs an engine that is watched token by token")
                continue
            if engine == "vllm" and not checkpoint_exists(arguments.checkpoint):
                raise SystemExit("vllm needs --checkpoint: write one with benchmarks/inflate.py")
            variants: list[dict[str, Any]] = [{}]
            if engine == "vllm":
                variants = [{"ngram": False}, {"ngram": True}]
            elif engine == "hf-batch":
                variants = [hf_batch_settings(model.device, given[one])]
            for chosen in variants:
                checkpoint = {"checkpoint": str(arguments.checkpoint)} if engine == "vllm" else {}
                try:
                    yield one, engine, chosen, PEERS[engine](model, given[one], chosen | checkpoint)
                except EngineMissingError as missing:
                    console.print(f"[yellow]{engine} skipped: {missing}")
                except (PeerFailedError, torch.OutOfMemoryError) as error:
                    yield one, engine, chosen, error
                release_memory()


def show(rows: list[dict[str, Any]]) -> Table:
    columns = (
        "workload",
        "engine",
        "tokens/s",
        "runs",
        "ms",
        "accepted",
        "right",
        "of light",
        "most",
        "equal",
        "KV bytes",
    )
    table = Table(*columns)
    for row in rows:

        def share(name: str, row: dict[str, Any] = row) -> str:
            return "-" if row[name] is None else f"{row[name]:.1%}"

        accepted = "-"
        if row["accepted_per_cycle"] is not None:
            accepted = f"{row['accepted_per_cycle']:.2f} of {row['drafts_per_cycle']:.2f}"
        speeds = row["runs"] or [row["tokens_per_second"]]
        table.add_row(
            row["workload"],
            label(row),
            f"{row['tokens_per_second']:,.0f}",
            f"{len(speeds)}, {max(speeds) / min(speeds) - 1:.1%} apart",
            "-" if row["ms_per_iteration"] is None else f"{row['ms_per_iteration']:.2f}",
            accepted,
            share("drafts_right"),
            share("light_share"),
            "-" if row["choice"] is None else f"{row['choice']} ({row['choice_share']:.0%})",
            share("equal_to_plain"),
            share("kv_bytes_share"),
        )
    return table


def main() -> None:
    arguments = parse_arguments()
    join_ranks(arguments.device)
    console = Console()
    asked = workloads(arguments)
    unknown = {name for name, _ in arguments.settings} - {None, *(one.name for one in asked)}
    if unknown:
        raise SystemExit(f"--settings: {', '.join(sorted(unknown))} is no workload of this run.")
    console.print(environment(arguments.device))
    results = Results(arguments, console)
    model, tokenizer = load_model(arguments.shape, arguments.device)
    given = loads(asked, tokenizer, arguments)
    given |= {one.at(1.0): load for one, load in given.items()}
    if {"plain", "sparsespec"} & set(arguments.engine):
        every = [PLAIN, *(chosen for _, chosen in arguments.settings)]
        ours = Ours(model, every, max(one.requests for one in asked), ranks())
        for row in run_ours(arguments, asked, given, ours):
            results.add(*row)
        del ours
        release_memory()
    for row in run_peers(arguments, given, model, console):
        results.add(*row)
    Console(width=max(console.width, 180)).print(show(results.rows))
    if ranks() > 1:
        dist.barrier()
        dist.destroy_process_group()
    if results.missing:
        sys.exit("\n".join(results.missing))


def _write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Rows of this run, in place of earlier ones of the same workload, engine, settings and ranks."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    if path is None:
        return
    earlier = json.loads(path.read_text()) if path.exists() else []
    names = ("workload", "engine", "settings", "right", "ranks")
    mine = [[row.get(name) for name in names] for row in rows]
    kept = [row for row in earlier if [row.get(name) for name in names] not in mine]
    path.write_text(json.dumps([*kept, *rows], indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ss.SparseSpecError as error:
        sys.exit(str(error))
