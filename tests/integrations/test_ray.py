"""`Generate` on Arrow batches, and in the actors of Ray Data."""

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pyarrow = pytest.importorskip("pyarrow", reason="needs pip install '.[ray]'")
ray = pytest.importorskip("ray", reason="needs pip install '.[ray]'")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import sparsespec_compile as ss  # noqa: E402
from sparsespec_compile.errors import ConfigError, StaleParametersError  # noqa: E402
from sparsespec_compile.integrations.ray import Generate  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COUNTDOWN = ROOT / "examples" / "countdown" / "model"
CONFIG = ss.SpecConfig(draft_tokens=4, min_budget=16, max_requests=16, max_length=512)
GREEDY = ss.SamplingParams(max_new_tokens=12, stop_token_ids=())


def load_model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(COUNTDOWN, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(COUNTDOWN)


@pytest.fixture(scope="module")
def expected(tokenizer):
    """The text of a prompt, by `generate_batch` of a model of its own."""
    model = ss.optimize(load_model(), CONFIG)

    def text(prompt, params):
        (completion,) = model.generate_batch([tokenizer(prompt).input_ids], params)
        return completion.token_ids

    return text


@pytest.fixture(scope="module")
def generate(tokenizer):
    def sampling(row):
        if row.get("bad"):
            raise ValueError(f"row {row['id']} has no settings")
        return replace(GREEDY, max_new_tokens=row["new"], temperature=0.7, seed=row["id"], n=row.get("n", 1))

    return Generate(load_model, sampling, tokenizer=tokenizer, config=CONFIG)


def prompts(count):
    return [f"solve {3 + row} 36 32 40 for 75\n" for row in range(count)]


def call(generate, table):
    return asyncio.run(generate(table))


def test_rows_come_back_in_order_with_generates_own_texts(generate, expected, tokenizer):
    asked = prompts(6)
    batch = pyarrow.table({"id": range(6), "prompt": asked, "new": [9, 3, 12, 5, 1, 7]})
    found = call(generate, batch)
    assert found.select(batch.column_names) == batch
    for row in found.to_pylist():
        params = replace(GREEDY, max_new_tokens=row["new"], temperature=0.7, seed=row["id"])
        assert row["token_ids"] == expected(row["prompt"], params)
        assert row["text"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert (row["finish_reason"], row["error"], row["sample"], row["logprobs"]) == ("length", None, 0, [])


def test_several_texts_of_a_row_are_rows_beside_each_other(generate):
    batch = pyarrow.table({"id": [5, 6], "prompt": prompts(2), "new": [4, 4], "n": [3, 1]})
    found = call(generate, batch).to_pylist()
    assert [(row["id"], row["sample"]) for row in found] == [(5, 0), (5, 1), (5, 2), (6, 0)]
    assert len({tuple(row["token_ids"]) for row in found[:3]}) > 1


def test_rows_that_fail_name_it_and_lose_nothing_else(generate, expected):
    asked = prompts(6)
    asked[1], asked[3] = None, asked[3] * 200
    batch = pyarrow.table(
        {"id": range(6), "prompt": asked, "new": [4, 4, 4, 4, 4, 0], "bad": [False, False, True, False, False, False]}
    )
    found = call(generate, batch)
    errors = [row["error"] for row in found.to_pylist()]
    assert [error and error.partition(":")[0] for error in errors] == [
        *(None, "PromptError", "ValueError", "PoolTooSmallError", None, "SamplingError")
    ]
    assert "row 2 has no settings" in errors[2]
    for row in found.to_pylist():
        if row["error"] is not None:
            assert (row["text"], row["token_ids"], row["finish_reason"]) == (None, None, None)
            continue
        params = replace(GREEDY, max_new_tokens=4, temperature=0.7, seed=row["id"])
        assert row["token_ids"] == expected(row["prompt"], params)
    assert found.schema.field("error").type == pyarrow.string()


def test_the_types_of_columns_do_not_depend_on_the_rows(generate):
    batch = pyarrow.table({"id": [0, 1], "prompt": prompts(2), "new": [2, 2], "bad": [False, True]})
    schemas = [call(generate, batch.slice(row, 1)).schema for row in range(2)]
    assert schemas[0].equals(schemas[1])
    assert call(generate, batch.slice(0, 0)).schema.equals(schemas[0])


def test_a_tokenizer_that_cannot_decode_one_text_fails_that_row(tokenizer):
    class Moody:
        def __call__(self, text):
            return tokenizer(text)

        def decode(self, tokens, **options):
            if len(tokens) == 3:
                raise RuntimeError("three tokens are too many")
            return tokenizer.decode(tokens, **options)

    generate = Generate(
        load_model, lambda row: replace(GREEDY, max_new_tokens=row["new"]), tokenizer=Moody(), config=CONFIG
    )
    found = call(generate, pyarrow.table({"prompt": prompts(3), "new": [2, 3, 4]})).to_pylist()
    assert [row["error"] for row in found] == [None, "RuntimeError: three tokens are too many", None]
    assert [len(row["token_ids"]) for row in found] == [2, 3, 4]


def test_token_ids_need_no_tokenizer_and_texts_do(tokenizer):
    generate = Generate(load_model, GREEDY, config=CONFIG, column="tokens")
    ids = [tokenizer(prompt).input_ids for prompt in prompts(2)]
    found = call(generate, pyarrow.table({"tokens": ids})).to_pylist()
    assert [len(row["token_ids"]) for row in found] == [12, 12]
    assert [row["text"] for row in found] == [None, None]
    (row,) = call(generate, pyarrow.table({"tokens": prompts(1)})).to_pylist()
    assert "there is no tokenizer" in row["error"]


def test_the_next_batch_is_admitted_while_the_last_drains(generate):
    """A text of 300 tokens holds the first batch up; the second is done long before."""
    ended = []

    async def timed(name, table):
        await generate(table)
        ended.append(name)

    async def both():
        long = pyarrow.table({"id": [0, 1], "prompt": prompts(2), "new": [2, 300]})
        first = asyncio.create_task(timed("first", long))
        await asyncio.sleep(0.2)
        await asyncio.gather(first, timed("second", pyarrow.table({"id": [2, 3], "prompt": prompts(2), "new": [3, 3]})))

    asyncio.run(both())
    assert ended == ["second", "first"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"prompt": [[1]]}, 'batch_format="pyarrow"'),
        (pyarrow.table({"question": ["a"]}), "no column 'prompt' of prompts; it has 'question'"),
        (pyarrow.table({"prompt": ["a"], "text": ["b"]}), "columns that Generate adds: 'text'"),
    ],
)
def test_batches_of_another_kind_are_refused(generate, batch, message):
    with pytest.raises(ConfigError, match=message):
        call(generate, batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("Qwen/Qwen3-8B",), "load_model must be a function"), ((load_model, {"top_k": 3}), "sampling must be")],
)
def test_arguments_of_another_kind_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Generate(*arguments)


def test_what_is_no_rows_fault_is_raised(tokenizer):
    generate = Generate(load_model, GREEDY, tokenizer=tokenizer, config=CONFIG)
    generate._model.model.lm_head = torch.nn.Linear(4, 4)
    with pytest.raises(StaleParametersError):
        call(generate, pyarrow.table({"prompt": prompts(1)}))


def test_processes_do_not_repeat_each_others_texts(tokenizer):
    """Every process begins with the same seed of torch; prompts without a seed would get equal texts in all actors."""
    texts = []
    for _ in range(2):
        torch.manual_seed(0)
        generate = Generate(load_model, replace(GREEDY, temperature=1.0), tokenizer=tokenizer, config=CONFIG)
        texts.append(call(generate, pyarrow.table({"prompt": prompts(4)}))["token_ids"].to_pylist())
    assert texts[0] != texts[1]


class Timed(Generate):
    """Adds which process took a batch, and when."""

    async def __call__(self, batch):
        began = time.time()
        table = await super().__call__(batch)
        for name, value in {"process": os.getpid(), "began": began, "ended": time.time()}.items():
            table = table.append_column(name, pyarrow.array([value] * len(table)))
        return table


@pytest.fixture(scope="module")
def cluster():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", runtime_env={"env_vars": {"PYTHONPATH": path}})
    context = ray.data.DataContext.get_current()
    context.wait_for_min_actors_s = 120  # or the first actor may do everything while the second still starts
    context.enable_progress_bars = False
    yield
    ray.shutdown()


def test_two_actors_share_the_rows_and_overlap_their_batches(cluster, tokenizer, expected):
    asked = prompts(32)
    asked[7] = ""

    def sampling(row):
        return replace(GREEDY, max_new_tokens=60 if row["id"] % 8 == 0 else 4)

    rows = [{"id": row, "prompt": prompt} for row, prompt in enumerate(asked)]
    found = (
        ray.data.from_items(rows, override_num_blocks=8)
        .map_batches(
            Timed,
            fn_constructor_args=(load_model, sampling),
            fn_constructor_kwargs={"tokenizer": tokenizer, "config": CONFIG},
            batch_format="pyarrow",
            batch_size=2,
            compute=ray.data.ActorPoolStrategy(size=2, max_concurrent_calls_per_actor=2),
        )
        .take_all()
    )
    assert sorted(row["id"] for row in found) == [*range(32)]
    assert [row["id"] for row in found if row["error"]] == [7]
    assert len({row["process"] for row in found}) == 2
    for row in found:
        if row["id"] in (0, 1, 17):
            assert row["token_ids"] == expected(row["prompt"], sampling(row))
    for process in {row["process"] for row in found}:
        calls = {(row["id"] // 2, row["began"], row["ended"]) for row in found if row["process"] == process}
        blocks = {(batch // 2, began, ended) for batch, began, ended in calls}
        # Batches of a block overlap, and so do those of different blocks.
        assert any(a < c < b for x, a, b in calls for y, c, _ in calls if x != y)
        assert any(a < c < b for x, a, b in blocks for y, c, _ in blocks if x != y)


def test_the_example_solves_puzzles(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "ray_batch.py"), "--puzzles", "8", "--batch-size", "2"]
    command += ["--max-new-tokens", "40", "--out", str(tmp_path / "texts")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "8 puzzles, " in done.stdout
    assert ", 0 failed" in done.stdout
    assert [*(tmp_path / "texts").glob("*.parquet")]
