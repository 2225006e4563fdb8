"""One model on several GPUs, or on several processes of a CPU: each rank holds a part of it.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Without arguments the ranks share the embedded Countdown model, offline, and solve puzzles. With `--model` they load any
causal LM with a plan for tensor parallelism. Each rank reads its part of the checkpoint alone, so the model may be
larger than one GPU; that takes `pip install accelerate`. Every rank makes the same calls with the same requests, and
gets the whole text; rank 0 prints it.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from countdown.device import usable_device
from countdown.puzzles import check_answer, puzzles
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sparsespec_compile as ss

COUNTDOWN = Path(__file__).parent / "countdown" / "model"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(COUNTDOWN), help="folder or hub id")
    parser.add_argument("--prompt", nargs="+", help="texts to continue; default: Countdown puzzles")
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    parser.add_argument("--draft-tokens", type=int, default=8)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> PreTrainedModel:
    """A whole small model, of which `optimize` leaves this rank's part, or no more than that part of a large one."""
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    if arguments.model == str(COUNTDOWN):
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device).eval()
    return ss.load_shards(arguments.model, dtype=dtype)


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    try:
        run(arguments)
    except ss.SparseSpecError as error:
        raise SystemExit(str(error)) from error
    dist.barrier()
    dist.destroy_process_group()


def run(arguments: argparse.Namespace) -> None:
    ranks, first = dist.get_world_size(), dist.get_rank() == 0
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    own = arguments.model == str(COUNTDOWN) and arguments.prompt is None
    found = puzzles(arguments.seed, held_out=True)
    texts = [next(found).prompt for _ in range(4)] if own else arguments.prompt
    if texts is None:
        raise SystemExit("--model needs a --prompt; puzzles are for the embedded model alone")
    config = ss.SpecConfig(draft_tokens=arguments.draft_tokens, tensor_parallel=ranks)
    fast = ss.optimize(load(arguments), config)
    held = sum(parameter.nbytes for parameter in fast.model.parameters()) / 2**20
    layer = fast.report.attention[0].layer
    print(f"rank {dist.get_rank()} of {ranks}: {held:.1f} MiB, {layer.q_heads} query heads, {layer.kv_heads} KV heads")
    sampling = ss.SamplingParams(max_new_tokens=arguments.max_new_tokens, temperature=0.6, seed=arguments.seed)
    for completion in fast.generate_batch([tokenizer(text).input_ids for text in texts], sampling):
        if first:
            text = texts[completion.index] + tokenizer.decode(completion.token_ids)
            print(f"{text}\n{check_answer(text).reason if own else ''}\n")
    if first:
        print(f"accepted of {arguments.draft_tokens} drafts: {fast.stats.accepted_per_cycle:.2f}")


if __name__ == "__main__":
    main()
