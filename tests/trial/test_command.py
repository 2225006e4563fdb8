"""`python -m sparsespec_compile audit` and `bench`, on a small saved model."""

import json

import pytest

from sparsespec_compile.__main__ import main

from ..support.models import tiny
from ..support.tokenizer import letters

SETTINGS = '{"draft_tokens": 3, "min_budget": 4, "budget_ratio": 0.01}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", num_hidden_layers=1).save_pretrained(folder)
    letters().save_pretrained(folder)
    (folder / "prompts.jsonl").write_text('{"prompt": "abcdef"}\n{"prompt": "bababcabababcdcdaa"}\n{"prompt": "no"}\n')
    return folder


def run(folder, command, *options):
    common = ("--prompts", str(folder / "prompts.jsonl"), "--limit", "2", "--device", "cpu", "--max-new-tokens", "16")
    return main([command, str(folder), *common, "--spec-config", SETTINGS, *options])


def test_an_audit_that_passes(folder, tmp_path, capsys):
    file = tmp_path / "audit.json"
    assert run(folder, "audit", "--json", str(file)) == 0
    figures = json.loads(file.read_text())
    assert (figures["verdict"], figures["passed"]) == ("equal", True)
    assert [check["texts"] for check in figures["checks"]] == [4] * 4
    assert figures["environment"]["model"] == str(folder)
    assert "verdict: every text is equal" in capsys.readouterr().out


def test_an_audit_that_fails(folder, tmp_path, monkeypatch, capsys):
    from sparsespec_compile.trial import audit

    generate = audit._generate

    def other(*arguments):
        written = generate(*arguments)
        written.texts[0][3] = (written.texts[0][3] + 1) % 150
        return written

    monkeypatch.setattr(audit, "_generate", other)
    assert run(folder, "audit") == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "verdict: WRONG" in printed
    assert "prompt 0, greedy: new token 3" in printed


def test_a_bench(folder, tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert run(folder, "bench", "--runs", "2", "--temperature", "0.5", "--json", str(file)) == 0
    figures = json.loads(file.read_text())
    assert len(figures["plain"]["seconds"]) == len(figures["speculative"]["seconds"]) == 2
    assert figures["plain"]["tokens"] == figures["speculative"]["tokens"] == [32, 32]
    assert figures["speedup"] == pytest.approx(
        figures["speculative"]["tokens_per_second"] / figures["plain"]["tokens_per_second"]
    )
    assert [(kind["drafter"], kind["drafts"]) for kind in figures["kinds"]] == [("pillar", 3)]
    assert 0 < figures["accepted"] < figures["drafts"]
    assert figures["equal"] == 1.0
    assert figures["predicted"] is None
    assert "cpu" in figures["unpredicted"].lower()
    printed = " ".join(capsys.readouterr().out.split())
    for said in ("tokens/s", "3 pillar", "speedup", "of the texts equal", "nothing predicted"):
        assert said in printed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--dtype", "int8"), "CommandError: --dtype must be auto, or a floating dtype"),
        (("--device", "nowhere"), "CommandError: --device nowhere cannot be used"),
        (("--device", "cuda:99"), "CommandError: --device cuda:99 cannot be used"),
        (("--limit", "0"), "CommandError: --limit must be at least 1"),
        (("--spec-config", "{"), "CommandError: --spec-config is no JSON"),
        (("--spec-config", "3"), "CommandError: --spec-config must be a JSON object"),
        (("--spec-config", '{"drafts": 3}'), "ConfigError: SpecConfig got unknown setting"),
        (("--json", "/nowhere/at/all.json"), "CommandError: --json /nowhere/at/all.json cannot be written"),
        (("--prompts", "/nowhere.jsonl"), "PromptError: The prompts cannot be read"),
        (("--max-new-tokens", "0"), "SamplingError: max_new_tokens"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("command", ["audit", "bench"])
def test_what_cannot_be_done_is_said(folder, command, options, says, capsys):
    assert run(folder, command, *options) == 2
    assert says in capsys.readouterr().err


def test_other_refusals(folder, tmp_path, capsys):
    assert main(["audit", str(tmp_path), "--prompts", str(folder / "prompts.jsonl")]) == 2
    assert f"CommandError: No model can be loaded from {tmp_path}" in capsys.readouterr().err


def test_help_names_the_commands_and_a_wrong_one_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for command, does in (("serve", "server"), ("audit", "texts"), ("bench", "gain")):
        assert any(line.split()[:1] == [command] and does in line for line in said.splitlines())
    for wrong in ([], ["sing"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
    assert "serve" in capsys.readouterr().err
