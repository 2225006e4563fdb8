"""Trains the Countdown model from scratch; one H200 needs minutes.

    python -m examples.countdown.train --out countdown-run --minutes 9

Most of the time goes into traces cut off at 4,096 tokens, the last part into traces of up to 16,384. The learning rate
follows the clock, so that it reaches zero exactly when the time is up. Started again, it goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

from .batches import IGNORE, Batch, pack, traces, training_batches
from .packed import build_model, hidden_states, mean_loss, model_config
from .tokenizer import CONTEXT, VOCABULARY, save_tokenizer

SHORT_WINDOW = 4096


@dataclass
class Progress:
    """How far the training is; saved with the weights."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    log: list[dict[str, float]] = field(default_factory=list)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint, the log and the model")
    parser.add_argument("--minutes", type=float, default=9.0, help="training time in all, over all restarts")
    parser.add_argument("--long-share", type=float, default=0.25, help="share of the time spent on 16k traces")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of a batch")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--workers", type=int, default=4, help="processes that write traces; 0 for none")
    parser.add_argument("--config", type=Path, help="a config.json to train instead of the real one, for trials")
    parser.add_argument("--report-every", type=float, default=20.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def build_optimizers(model: Qwen3ForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1] + [model.model.embed_tokens.weight]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int, done: float, warmup: int) -> float:
    """Share of the peak learning rate: up over the first steps, level, then down to zero over the last 70%."""
    return min(1.0, (step + 1) / warmup, max(0.0, (1.0 - done) / 0.7))


class Trainer:
    """One run: the model, its optimizers and its data."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        config = Qwen3Config.from_json_file(args.config) if args.config else model_config()
        self.model = build_model(config)
        torch.nn.Module.to(self.model, self.device)
        self.optimizers = build_optimizers(self.model, args.learning_rate)
        self.progress = Progress()
        self.checkpoint = args.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.resume()
        self.loss = mean_loss
        if args.compile:
            for layer in self.model.model.layers:
                layer.compile()
            self.loss = torch.compile(mean_loss)

    @property
    def done(self) -> float:
        """Share of the training time that is over."""
        return self.progress.seconds / (60 * self.args.minutes)

    def window(self) -> int:
        return SHORT_WINDOW if self.done < 1 - self.args.long_share else CONTEXT

    def resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        print(f"resumed at step {self.progress.step}, {self.progress.seconds:.0f} s", flush=True)

    def save_checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.checkpoint)

    def forward(self, batch: Batch) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return hidden_states(self.model, batch)

    def step(self, batch: Batch) -> torch.Tensor:
        factor = rate_factor(self.progress.step, self.done, self.args.warmup)
        hidden = self.forward(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.loss(hidden, self.model.model.embed_tokens.weight, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def errors(self, batch: Batch) -> dict[str, float]:
        """Mistakes per 1,000 determined tokens of held-out traces, by kind of token, when the likeliest is taken."""
        # With gradients, as in training: without them every layer would be compiled a second time.
        hidden = self.forward(batch).detach()
        wrong = (hidden[0].float() @ self.model.model.embed_tokens.weight.T).argmax(-1) != batch.targets
        counted = batch.determined & (batch.targets != IGNORE)
        first_number, first_label = VOCABULARY["1"], VOCABULARY["#0"]
        kinds = {
            "symbols": batch.targets < first_number,
            "numbers": (batch.targets >= first_number) & (batch.targets < first_label),
            "labels": batch.targets >= first_label,
        }
        return {name: 1000 * wrong[counted & kind].float().mean().item() for name, kind in kinds.items()}

    def report(self, losses: list[torch.Tensor], held_out: Batch, window: int) -> None:
        progress = self.progress
        entry = {
            "step": progress.step,
            "seconds": round(progress.seconds, 1),
            "tokens": progress.tokens,
            "window": window,
            "loss": round(torch.stack(losses).mean().item(), 4),
            **{f"{name} wrong per 1000": round(value, 3) for name, value in self.errors(held_out).items()},
        }
        progress.log.append(entry)
        print(json.dumps(entry), flush=True)

    def run(self) -> None:
        args, progress = self.args, self.progress
        window = self.window()
        data, held_out = self.data(window)
        losses: list[torch.Tensor] = []
        reported = last = time.perf_counter()
        while self.done < 1.0:
            if self.window() != window:
                window = self.window()
                data, held_out = self.data(window)
            losses.append(self.step(next(data).to(self.device)))
            progress.step += 1
            progress.tokens += args.tokens
            if progress.step % 10 == 0 and self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            progress.seconds += now - last
            last = now
            if now - reported > args.report_every or self.done >= 1.0:
                self.report(losses, held_out, window)
                losses, reported = [], now
                self.save_checkpoint()
        self.save_model()

    def data(self, window: int) -> tuple[Iterator[Batch], Batch]:
        """Training batches, different after every restart, and one held-out batch."""
        seed = self.args.seed + self.progress.step + 1
        stream = training_batches(seed, window, self.args.tokens, self.args.workers)
        return stream, pack(traces(0, True, window), self.args.tokens).to(self.device)

    def save_model(self) -> None:
        """Writes the model as transformers loads it, and the log of the training."""
        folder = self.args.out / "model"
        trained = Qwen3ForCausalLM(self.model.config)
        trained.load_state_dict(self.model.state_dict())
        trained.generation_config = self.model.generation_config
        trained.bfloat16().save_pretrained(folder)
        save_tokenizer(folder)
        settings = {name: value for name, value in vars(self.args).items() if not isinstance(value, Path)}
        record = {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "parameters": trained.num_parameters(),
            "settings": settings,
            **asdict(self.progress),
        }
        (self.args.out / "train.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
