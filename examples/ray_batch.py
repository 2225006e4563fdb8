"""Solves puzzles with several compiled models at once, each in an actor of Ray Data, and counts the right answers.

It needs Ray: `pip install '.[ray]'`. Without arguments two actors run the embedded Countdown model on
CPUs. With `--device cuda` every actor has a GPU of its own.
"""

import argparse
from itertools import islice
from pathlib import Path

import ray
import torch
from countdown.device import usable_device
from countdown.puzzles import check_answer, puzzles
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sparsespec_compile as ss
from sparsespec_compile.integrations.ray import Generate, Row

COUNTDOWN = Path(__file__).parent / "countdown" / "model"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--puzzles", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="rows that Ray hands over at once")
    parser.add_argument("--device", type=usable_device, default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the texts, as Parquet files")
    return parser.parse_args()


def texts(arguments: argparse.Namespace) -> ray.data.Dataset:
    """The puzzles and what the model wrote; nothing runs before it is read."""

    def load_model() -> PreTrainedModel:
        torch.set_num_threads(1)  # actors share the processors
        dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
        return AutoModelForCausalLM.from_pretrained(COUNTDOWN, dtype=dtype).to(arguments.device).eval()

    def sampling(row: Row) -> ss.SamplingParams:
        return ss.SamplingParams(max_new_tokens=arguments.max_new_tokens, temperature=0.6, seed=row["id"])

    asked = islice(puzzles(6, held_out=True), arguments.puzzles)
    rows = [{"id": number, "prompt": puzzle.prompt} for number, puzzle in enumerate(asked)]
    return ray.data.from_items(rows, override_num_blocks=2 * arguments.actors).map_batches(
        Generate,
        fn_constructor_args=(load_model, sampling),
        fn_constructor_kwargs={"tokenizer": AutoTokenizer.from_pretrained(COUNTDOWN)},
        batch_format="pyarrow",
        batch_size=arguments.batch_size,
        num_gpus=1 if arguments.device == "cuda" else 0,
        # A second block is begun before the last texts of the first one are written.
        compute=ray.data.ActorPoolStrategy(size=arguments.actors, max_concurrent_calls_per_actor=2),
    )


def main() -> None:
    arguments = parse_arguments()
    written = texts(arguments).materialize()
    if arguments.out is not None:
        written.write_parquet(str(arguments.out))
    rows = written.take_all()
    right = sum(row["error"] is None and check_answer(row["prompt"] + row["text"]).correct for row in rows)
    failed = sum(row["error"] is not None for row in rows)
    Console().print(f"{len(rows)} puzzles, {right} solved, {failed} failed")


if __name__ == "__main__":
    main()
