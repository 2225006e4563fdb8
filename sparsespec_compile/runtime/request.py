"""One request, as the host knows it."""

from dataclasses import dataclass, field

from sparsespec_compile.runtime.sampling import SamplingParams


@dataclass(eq=False)
class Request:
    """A prompt on its way to a text.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: new tokens at most.
        params: how its tokens are drawn.
        stop_tokens: the text ends with the first of these, which is part of it.
        output: the tokens that are final so far.
        finished: whether `output` is complete.
        slot: row in the state tensors, -1 while waiting or done.
        pages: pages of the pool that it holds.
        prefilled: prompt tokens that were sent to the device.
        phase: the iterations in which it verifies are those with `iteration % (k + 1) == phase`; None before.
        drafted: drafts of the cycle under way.
    """

    prompt: list[int]
    max_new_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_tokens: frozenset[int] = frozenset()
    output: list[int] = field(default_factory=list)
    finished: bool = False
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    prefilled: int = 0
    phase: int | None = None
    drafted: int = 0

    @property
    def max_length(self) -> int:
        """Prompt and new tokens together, at most."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def prefilling(self) -> bool:
        """Whether prompt tokens are still to be sent."""
        return self.prefilled < len(self.prompt)

    @property
    def cached(self) -> int:
        """Positions with exact K/V in the pool: all but the newest token, once the prompt is through."""
        return self.prefilled if self.prefilling else len(self.prompt) + max(0, len(self.output) - 1)

    def append(self, tokens: list[int]) -> list[int]:
        """Add final tokens up to the text's end; returns those that were added, which may be fewer."""
        added = []
        for token in tokens:
            if self.finished:
                break
            added.append(token)
            self.output.append(token)
            self.finished = token in self.stop_tokens or len(self.output) == self.max_new_tokens
        return added
