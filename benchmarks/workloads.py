"""What the throughput benchmark asks of every engine, and what it is told.

A workload is written RxL, R requests that already have L tokens of real reasoning each. What may follow, in this order:

- +N: N new tokens of each text in place of `--new-tokens`, as in 64x50+2950 for texts that grow from nothing;
- -drain: a batch that drains, in which the shortest text has a quarter of the longest one's new tokens;
- @S: drafts of which only the share S is left as the model makes them, as in 64x8192@0.95 (`wrong_drafts.py`).
"""

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Workload:
    """Requests that are decoded together.

    Attributes:
        requests: their number.
        length: tokens of each prompt.
        new_tokens: of each text, or of the longest.
        drains: whether texts end one after the other.
        right: share of the drafts that are left as the model makes them; 1.0 = all, no draft is looked at.
        base: how it was written, without a share.
    """

    requests: int
    length: int
    new_tokens: int
    drains: bool
    right: float
    base: str

    @property
    def name(self) -> str:
        """How it is written."""
        return self.base if self.right == 1.0 else f"{self.base}@{self.right:g}"

    def at(self, right: float) -> "Workload":
        """The same with another share."""
        return replace(self, right=right)


_FORM = re.compile(r"(([1-9]\d*)x([1-9]\d*)(?:\+([1-9]\d*))?(-drain)?)(?:@(1|0\.\d+))?")


def workload(name: str, new_tokens: int = 256) -> Workload:
    """The workload of a name; `new_tokens` where the name has none. Ends the command for a name that is none."""
    match = _FORM.fullmatch(name)
    if match is None:
        raise SystemExit(
            f"--workload {name}: give requests x cached tokens, such as 64x8192, with new tokens, such as 64x50+2950, "
            "-drain, or a share of right drafts, such as @0.95, behind, in this order."
        )
    base, requests, length, own, drains, right = match.groups()
    return Workload(int(requests), int(length), int(own or new_tokens), drains is not None, float(right or 1), base)


@dataclass(frozen=True)
class Load:
    """What every engine is given.

    Attributes:
        prompts: token ids.
        new_tokens: tokens of each text, or of the longest.
        temperature: 0 = greedy.
        seed: of the first text; the others count on.
        drains: texts end one after the other, the first with a quarter of the last one's new tokens.
    """

    prompts: list[list[int]]
    new_tokens: int
    temperature: float
    seed: int
    drains: bool = False

    def new_tokens_of(self, index: int) -> int:
        """New tokens of a text."""
        others = max(1, len(self.prompts) - 1)
        return self.new_tokens * (others + 3 * index) // (4 * others) if self.drains else self.new_tokens

    @property
    def short(self) -> int:
        """New tokens of a black box's shorter run, and those before the clock where steps are watched."""
        return max(1, self.new_tokens // 5)


@dataclass(frozen=True)
class Measured:
    """What an engine did while the clock ran, in the median of its runs; None where it does not tell.

    Attributes:
        tokens_per_second: of all requests together.
        runs: tokens a second of each run.
        ms_per_iteration: mean.
        accepted_per_cycle, drafts_per_cycle: mean of full cycles, of the whole run.
        drafts_right: of the drafts whose predecessors in their cycle were right, the share that was, of the whole run.
        choice: the kind of cycle that most iterations belonged to, a drafter and a number of drafts.
        choice_share: of the iterations.
        light_share: the speed of light over the time of an iteration, see `speed_of_light.py`.
        tokens_per_iteration: mean.
        kv_bytes_share: bytes of KV cache read over what plain decoding would have read.
        gpu_idle_share: see `gpu_trace.py`.
        texts: token ids.
    """

    tokens_per_second: float
    ms_per_iteration: float | None = None
    accepted_per_cycle: float | None = None
    drafts_per_cycle: float | None = None
    drafts_right: float | None = None
    choice: str | None = None
    choice_share: float | None = None
    light_share: float | None = None
    tokens_per_iteration: float | None = None
    kv_bytes_share: float | None = None
    gpu_idle_share: float | None = None
    runs: tuple[float, ...] = ()
    texts: list[list[int]] | None = None
