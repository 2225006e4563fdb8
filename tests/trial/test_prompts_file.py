"""Prompts are read from the shapes in which data sets have them, and what is wrong with a file is said by row."""

import json

import pytest

from sparsespec_compile.errors import PromptError
from sparsespec_compile.trial.command import prompts_of

CHAT = [{"role": "user", "content": "ab"}]


def read(folder, name, content, **options):
    file = folder / name
    file.write_text(content, encoding="utf-8")
    return prompts_of(file, **options)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "ab"}, "ab"),
        ({"prompt": CHAT, "completion": "no"}, CHAT),
        ({"messages": CHAT}, CHAT),
        ({"messages": [*CHAT, {"role": "assistant", "content": "the answer"}]}, CHAT),
        ({"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "no"}]}, CHAT),
        ({"instruction": "do", "input": "this", "output": "no"}, "do\n\nthis"),
        ({"instruction": "do", "input": ""}, "do"),
        ({"question": "ab", "answer": "no"}, "ab"),
        ({"text": "ab"}, "ab"),
        ({"input_ids": [3, 4]}, [3, 4]),
        ({"prompt": None, "prompt_token_ids": [3]}, [3]),
        ("ab", "ab"),
        ([3, 4], [3, 4]),
        (CHAT, CHAT),
    ],
    ids=str,
)
def test_a_row_of(tmp_path, row, prompt):
    assert read(tmp_path, "a.jsonl", json.dumps(row) + "\n\n") == [prompt]
    assert read(tmp_path, "a.json", json.dumps([row, row])) == [prompt, prompt]


def test_other_formats(tmp_path):
    assert read(tmp_path, "a.txt", "\ufeffone\r\ntwo\n\n") == ["one", "two"]
    assert read(tmp_path, "a.csv", 'id,prompt\n1,"a, b"\n2,c\n') == ["a, b", "c"]
    assert read(tmp_path, "a.tsv", "question\tanswer\nab\tno\n") == ["ab"]


def test_a_field_and_a_limit(tmp_path):
    rows = "\n".join(json.dumps({"prompt": "no", "mine": f"text {n}"}) for n in range(4))
    assert read(tmp_path, "a.jsonl", rows, field="mine", limit=2) == ["text 0", "text 1"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', r"a\.jsonl, line 2 is no JSON: .*Allowed: \.jsonl"),
        ("a.jsonl", '{"answer": "a", "id": 1}', r"line 1 has no prompt; its fields are answer, id"),
        ("a.jsonl", '{"prompt": ""}', r"line 1 has no prompt, got ''"),
        ("a.jsonl", '{"prompt": [1.5]}', r"line 1 has no prompt, got \[1\.5\]"),
        ("a.jsonl", "[true]", "has no prompt"),
        ("a.jsonl", '{"messages": [{"content": "a"}]}', "line 1 has a message without a role"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "nobody but the assistant speaks"),
        ("a.json", '{"prompt": "a"}', "holds a JSON dict, not a list"),
        ("a.csv", "id,answer\n1,a\n", "row 1 has no prompt; its fields are id, answer"),
        ("a.txt", "\n \n", "holds no prompts"),
    ],
)
def test_what_is_wrong(tmp_path, name, content, says):
    with pytest.raises(PromptError, match=says):
        read(tmp_path, name, content)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(PromptError, match=r"cannot be read from .*missing"):
        prompts_of(tmp_path / "missing.jsonl")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(PromptError, match="cannot be read"):
        prompts_of(tmp_path / "bytes.txt")
    with pytest.raises(PromptError, match="has no mine; its fields are prompt"):
        read(tmp_path, "a.jsonl", '{"prompt": "a"}', field="mine")
