"""`python -m sparsespec_compile audit MODEL --prompts FILE`, and `bench`: their options, and prompts from a file.

Files have prompts in the shapes in which data sets have them.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparsespec_compile.api import optimize
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import CommandError, PromptError, SparseSpecError
from sparsespec_compile.requests.prompts import Prompt
from sparsespec_compile.trial.audit import AuditReport, audit
from sparsespec_compile.trial.bench import BenchReport, bench

PASSED, FAILED, REFUSED = 0, 1, 2
"""Exit statuses: texts are right, or the benchmark ran; texts are wrong, or it is unclear; what was asked cannot be."""

SETTINGS = frozenset({"max_new_tokens", "temperature", "seed", "runs"})
"""Options that `audit` or `bench` takes under the same name."""


def audit_command(arguments: list[str]) -> int:
    """Are the texts of a model right? See `audit`. Returns 0 if they are, 1 if not, 2 if it could not be seen."""
    parser = _parser("audit", "Are the texts of this model right, on these prompts and this device?")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the sampled texts (default 0.8)")
    return _run(parser.parse_args(arguments), audit)


def bench_command(arguments: list[str]) -> int:
    """What speculation gains for a model: see `bench`. Returns 0, or 2 if it could not be measured."""
    parser = _parser("bench", "What does speculation gain for this model, on these prompts and this device?")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--runs", type=int, default=3, help="whose median counts (default 3)")
    return _run(parser.parse_args(arguments), bench)


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m sparsespec_compile {name}", description=description)
    parser.add_argument("model", metavar="MODEL", help="a folder or a hub id")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="jsonl, json, csv, tsv, or a text in each line"
    )
    parser.add_argument("--field", help=f"of a row, in place of {', '.join(FIELDS)}")
    parser.add_argument("--limit", type=int, default=32, help="prompts at most (default 32)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of each text (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="auto", help="such as bfloat16; auto, the default, is the checkpoint's")
    parser.add_argument("--spec-config", default="{}", help="SpecConfig as JSON: '{\"draft_tokens\": 8}'")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser


def _run(options: argparse.Namespace, trial: Callable[..., AuditReport | BenchReport]) -> int:
    settings = {name: value for name, value in vars(options).items() if name in SETTINGS}
    try:
        _require_file(options.json)
        if options.limit < 1:
            raise CommandError(f"--limit must be at least 1, got {options.limit}.")
        prompts = prompts_of(options.prompts, options.field, options.limit)
        config = _spec_config(options.spec_config)
        model, tokenizer = _load(options.model, options.device, options.dtype)
        report = trial(optimize(model, config), prompts, tokenizer=tokenizer, **settings)
    except SparseSpecError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return REFUSED
    Console().print(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report.figures(), indent=1) + "\n")
    return PASSED if getattr(report, "passed", True) else FAILED


def _require_file(path: Path | None) -> None:
    """Before anything is computed: hours of it may be lost at the end."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise CommandError(f"--json {path} cannot be written: give a file in a folder that exists.")


def _spec_config(text: str) -> SpecConfig:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise CommandError(f"--spec-config is no JSON: {error}. Write '{{\"draft_tokens\": 8}}'.") from error
    if not isinstance(found, dict):
        raise CommandError(f"--spec-config must be a JSON object, got {text}. Write '{{\"draft_tokens\": 8}}'.")
    return SpecConfig(**found)


def _load(name: str, device: str | None, dtype: str) -> tuple[PreTrainedModel, Any]:
    """The model, in evaluation mode, and its tokenizer; None where there is none, as prompts may be token ids."""
    wanted = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise CommandError(f"--dtype must be auto, or a floating dtype of torch such as bfloat16, got {dtype}.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch says a missing CUDA by an assertion
        raise CommandError(f"--device {device} cannot be used: {error}. Choose cpu, or a CUDA device.") from error
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if dtype == "auto" else wanted)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(
            f"No model can be loaded from {name}: {error} Give a folder that save_pretrained has written, or the id "
            "of a causal LM on the hub."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError):
        tokenizer = None
    return model.to(place).eval(), tokenizer


FIELDS = ("prompt", "messages", "conversations", "conversation", "input_ids", "prompt_token_ids", "question", "text")
"""Fields of a row that hold its prompt; the first that is there counts."""

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
"""Roles of chats that say from and value, by their names there."""

_ALLOWED = (
    "Allowed: .jsonl with a JSON value in each line, .json with a list of them, .csv or .tsv with a header, and other "
    f"files with a text in each line. A value is a text, or an object with one of the fields {', '.join(FIELDS)}, or "
    "instruction and input, or the one that is named; a field is a text, a list of messages or of token ids."
)


def prompts_of(path: Path, field: str | None = None, limit: int | None = None) -> list[Prompt]:
    """Read prompts.

    Chats end with the last message that is not the assistant's: what follows it in a data set is the answer.

    Args:
        path: the file; its suffix tells its format.
        field: of a row; None = the first of `FIELDS` that it has.
        limit: prompts at most; None = all.

    Raises:
        PromptError: the file cannot be read, or a row of it has no prompt; the text names the row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"The prompts cannot be read from {path}: {error}. {_ALLOWED}") from error
    prompts: list[Prompt] = []
    for where, row in _rows(path, text):
        if limit is not None and len(prompts) == limit:
            break
        prompts.append(_prompt(f"{path}, {where}", row, field))
    if not prompts:
        raise PromptError(f"{path} holds no prompts. {_ALLOWED}")
    return prompts


def _rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".json":
        rows = _json(f"{path}", text)
        if not isinstance(rows, list):
            raise PromptError(f"{path} holds a JSON {type(rows).__name__}, not a list. {_ALLOWED}")
        yield from ((f"entry {number}", row) for number, row in enumerate(rows, 1))
    elif suffix in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ",")
        yield from ((f"row {number}", row) for number, row in enumerate(reader, 1))
    else:
        lines: Iterable[tuple[int, str]] = enumerate(text.split("\n"), 1)
        for number, line in lines:
            if line.strip():
                where = f"line {number}"
                yield where, _json(f"{path}, {where}", line) if suffix in (".jsonl", ".ndjson") else line.rstrip("\r")


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where} is no JSON: {error}. {_ALLOWED}") from error


def _prompt(where: str, row: Any, field: str | None) -> Prompt:
    if isinstance(row, Mapping):
        name = field if field is not None else next((name for name in FIELDS if row.get(name) is not None), None)
        if name is None and isinstance(row.get("instruction"), str):
            value = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        elif name is None or row.get(name) is None:
            raise PromptError(
                f"{where} has no {name or 'prompt'}; its fields are {', '.join(map(str, row))}. {_ALLOWED}"
            )
        else:
            value = row[name]
    else:
        value = row
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        return _chat(where, value)
    raise PromptError(f"{where} has no prompt, got {value!r:.80}. {_ALLOWED}")


def _chat(where: str, messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    chat: list[Mapping[str, Any]] = []
    for message in messages:
        if "from" in message and "value" in message:
            role = str(message["from"])
            message = {"role": _ROLES.get(role, role), "content": message["value"]}
        if "role" not in message:
            raise PromptError(f"{where} has a message without a role: {dict(message)!r:.80}. {_ALLOWED}")
        chat.append(message)
    while chat and chat[-1]["role"] == "assistant":
        chat.pop()
    if not chat:
        raise PromptError(f"{where} is a chat in which nobody but the assistant speaks. {_ALLOWED}")
    return chat
