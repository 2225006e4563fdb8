"""The Countdown example: puzzles, traces, tokenizer, decoder and the model that is shipped with it."""

import json
import random
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from countdown import batches, puzzles, tokenizer, trace  # noqa: E402
from countdown.decode import sample  # noqa: E402
from countdown.hard_puzzles import COUNT, load_hard_puzzles  # noqa: E402
from countdown.packed import build_model, hidden_states, model_config  # noqa: E402

MODEL = ROOT / "examples" / "countdown" / "model"


@pytest.fixture(scope="module")
def traces():
    rng = random.Random(5)
    return [trace.write_trace(puzzle, rng, 4096) for puzzle in islice(puzzles.puzzles(5, held_out=True), 60)]


def tiny_config() -> Qwen3Config:
    config = model_config()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 96, 2
    config.layer_types = config.layer_types[:2]
    return config


def test_the_answer_of_every_finished_trace_is_right(traces):
    finished = [one for one in traces if one.solved]
    assert len(finished) > 30
    for one in finished:
        assert puzzles.check_answer(" ".join(one.tokens)) == puzzles.Verdict(True, "right")


def test_every_calculation_of_a_trace_is_right_and_uses_the_numbers_at_hand(traces):
    for one in traces:
        for line in " ".join(one.tokens).split("\n")[2:-1]:
            words = line.split()
            if words[1] == "|" or words[0] == "answer":
                continue
            left, operator, right, result = words[1], words[2], words[3], words[5]
            assert puzzles.calculate(int(left), operator, int(right)) == int(result), line


def test_an_unfinished_trace_is_cut_off_at_the_limit(traces):
    unfinished = [one for one in traces if not one.solved]
    assert unfinished
    assert {len(one.tokens) for one in unfinished} == {4096}


def test_no_label_is_planned_twice_in_a_trace():
    longest = max(
        (trace.write_trace(puzzle, random.Random(1), tokenizer.CONTEXT) for puzzle in load_hard_puzzles()[:5]),
        key=lambda one: len(one.tokens),
    )
    planned = set()
    for line in " ".join(longest.tokens).split("\n"):
        labels = [word for word in line.partition("?")[2].split() if word.startswith("#")]
        assert not planned & set(labels)
        planned |= set(labels)
    assert len(planned) < tokenizer.LABELS


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("20 + 3 = 23 , 23 * 5 = 115", "right"),
        ("20 + 3 = 24 , 24 * 5 = 120", "20 + 3 is not 24"),
        ("20 * 5 = 100 , 100 + 20 = 120", "100 + 20 uses a number that is not at hand"),
        ("20 * 5 = 100", "the answer reaches 100 instead of 115"),
        ("3 / 20 = 0 , 20 * 5 = 100", "3 / 20 is not 0"),
        ("", "the answer reaches None instead of 115"),
    ],
)
def test_checker_tells_right_from_wrong(answer, reason):
    verdict = puzzles.check_answer(f"solve 20 3 5 7 for 115\n#1 | 20 3 5 7\nanswer {answer}")
    assert verdict == puzzles.Verdict(reason == "right", reason)


def test_checker_without_an_answer():
    assert puzzles.check_answer("solve 20 3 5 7 for 115\n#1 | 20 3").reason == "no answer"


def test_prompts_are_parsed_back_and_other_texts_refused():
    for puzzle in islice(puzzles.puzzles(2, held_out=False), 20):
        assert puzzles.parse_puzzle(puzzle.prompt) == puzzle
    with pytest.raises(puzzles.PuzzleError, match="a prompt reads like"):
        puzzles.parse_puzzle("what is 3 + 4?")
    with pytest.raises(puzzles.PuzzleError, match="all different"):
        puzzles.Puzzle((3, 3, 4, 5), 70)
    with pytest.raises(puzzles.PuzzleError, match=r"lie in 1\.\.299"):
        puzzles.Puzzle((3, 2, 4, 5), 300)


def test_splits_are_disjoint_whatever_the_order_of_the_numbers():
    def keys(held_out):
        found = islice(puzzles.puzzles(3, held_out), 100)
        return {(tuple(sorted(puzzle.numbers)), puzzle.target) for puzzle in found}

    held_out = keys(True)
    assert not held_out & keys(False)
    for numbers, target in held_out:
        shuffled = random.Random(0).sample(numbers, len(numbers))
        assert puzzles.Puzzle(tuple(shuffled), target).held_out


def test_hard_puzzles_are_held_out():
    hard = load_hard_puzzles()
    assert len(set(hard)) == len(hard) == COUNT
    assert all(puzzle.held_out for puzzle in hard)


def test_tokenizer_round_trip(traces, tmp_path):
    tokenizer.save_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for one in traces[:10]:
        ids = tokenizer.encode(one.tokens)
        text = loaded.decode(ids)
        assert loaded(text)["input_ids"] == ids
        assert "".join(loaded.decode([index]) for index in ids) == text
        assert loaded(puzzles.parse_puzzle(text).prompt)["input_ids"] == ids[: one.prompt_length]
    assert len(loaded) == tokenizer.VOCABULARY_SIZE
    assert (loaded.eos_token, loaded.pad_token, loaded.padding_side) == ("<eos>", "<pad>", "left")


def test_packed_traces_do_not_see_each_other():
    batch = batches.pack(batches.traces(1, True, 128), 512)
    torch.manual_seed(0)
    packed = build_model(tiny_config())
    plain = Qwen3ForCausalLM(tiny_config())
    plain.load_state_dict(packed.state_dict())
    hidden = hidden_states(packed, batch)[0]
    edges = batch.boundaries.unique().tolist()
    assert len(edges) > 3
    for start, end in pairwise(edges):
        expected = plain.model(batch.tokens[None, start:end]).last_hidden_state[0]
        torch.testing.assert_close(hidden[start:end], expected, rtol=1e-4, atol=1e-4)


def test_targets_leave_out_the_prompt():
    batch = batches.pack(batches.traces(1, True, 128), 512)
    assert (batch.targets[:7] == batches.IGNORE).all()
    assert torch.equal(batch.targets[9:100], batch.tokens[10:101])


def test_decoder_gives_the_text_of_generate():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(tiny_config()).eval()
    words = AutoTokenizer.from_pretrained(MODEL)
    prompts = [puzzle.prompt for puzzle in islice(puzzles.puzzles(4, held_out=True), 3)]
    texts = sample(model, words(prompts)["input_ids"], limit=60, temperature=0.0, seed=0)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = words(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_length=60, do_sample=False)
        assert text == expected[0].tolist()


@pytest.mark.slow
def test_training_saves_resumes_and_ships_a_loadable_model(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "examples.countdown.train", "--out", str(tmp_path / "run"), "--no-compile"]
    command += ["--config", str(tmp_path / "config.json"), "--tokens", "256", "--workers", "0"]

    def train(minutes: float) -> dict:
        subprocess.run([*command, "--minutes", str(minutes)], cwd=ROOT, check=True, capture_output=True, timeout=120)
        return json.loads((tmp_path / "run" / "train.json").read_text())

    first = train(0.005)
    second = train(first["seconds"] / 60 + 0.01)
    assert second["log"][: len(first["log"])] == first["log"]
    assert second["step"] > first["step"] > 0
    assert second["tokens"] == 256 * second["step"]
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.dtype == torch.bfloat16


def test_shipped_model_is_what_was_promised():
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    model, loading = Qwen3ForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    config = model.config
    assert 5e6 <= model.num_parameters() <= 8e6
    assert config.num_attention_heads == 4 * config.num_key_value_heads
    assert config.head_dim == 64
    assert config.max_position_embeddings == 16384
    assert config.rope_parameters["rope_type"] == "default"
    generation = GenerationConfig.from_pretrained(MODEL)
    words = AutoTokenizer.from_pretrained(MODEL)
    assert (generation.do_sample, generation.temperature) == (True, 0.6)
    assert (generation.eos_token_id, generation.pad_token_id) == (words.eos_token_id, words.pad_token_id)


def test_shipped_model_writes_correct_reasoning():
    """Greedily, so that the result does not depend on the machine's noise: 200 tokens, every calculation right."""
    model = Qwen3ForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(MODEL)
    puzzle = next(puzzles.puzzles(9, held_out=True))
    text = words.decode(sample(model, words([puzzle.prompt])["input_ids"], limit=200, temperature=0.0, seed=0)[0])
    calculations = puzzles.STEP.findall(text)
    assert len(calculations) > 5
    for left, operator, right, result in calculations:
        assert puzzles.calculate(int(left), operator, int(right)) == int(result)
