"""What an iteration of a compiled model reads and computes, where its time goes, and how far that is from the limit."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console, Group
from rich.table import Table

from sparsespec_compile.advice.calibration import ceilings_of
from sparsespec_compile.advice.ceilings import Ceilings
from sparsespec_compile.advice.prediction import Prediction, predict_cycle
from sparsespec_compile.advice.workload import Workload, workload
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.passes.cost.terms import IterationCost
from sparsespec_compile.runtime.device.drafters import cycles_of
from sparsespec_compile.runtime.host.phases import phases_in_use

WIDTH = 140
LEGEND = (
    "T rows, R rows with logits, D drafting and V verifying requests, L mean cached length, k drafts of a cycle, "
    "b cached positions that a draft reads"
)


@dataclass(frozen=True)
class Explanation:
    """The cost of a mean iteration in the steady state. Print it, with `print` or with rich.

    Attributes:
        cost: bytes and FLOPs as expressions.
        config: settings of the compiled model.
        workload: mean cached length, and requests.
        device: its name.
        prediction: times at these settings.
        plain: times of plain decoding, for comparison.
    """

    cost: IterationCost
    config: SpecConfig
    workload: Workload
    device: str
    prediction: Prediction
    plain: Prediction

    def __rich__(self) -> Group:
        return Group(self._table(), *self.lines())

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, record=True)
        console.print(self)
        return console.export_text()

    def lines(self) -> list[str]:
        """The summary below the table."""
        mean, top = self.prediction, self.prediction.dominating
        k, requests = self.config.most_draft_tokens, self.workload.batch
        phases = phases_in_use(self.config.schedule, k, requests)
        return [
            LEGEND,
            f"each request verifies in one of {k + 1} iterations; {requests} requests share {phases} of them",
            f"predicted {mean.seconds * 1e3:.3g} ms an iteration; speed of light {mean.light_seconds * 1e3:.3g} ms, "
            f"{mean.roofline_share:.0%} of the prediction",
            f"longest: {top.name}, {top.seconds / mean.seconds:.0%}",
            f"plain decoding: predicted {self.plain.seconds * 1e3:.3g} ms, speed of light "
            f"{self.plain.light_seconds * 1e3:.3g} ms, longest: {self.plain.dominating.name}",
        ]

    def _table(self) -> Table:
        load, k = self.workload, self.config.most_draft_tokens
        table = Table(title=f"{load.batch} requests at {load.length:,.0f} cached tokens, k = {k}, {self.device}")
        for heading in ("term", "bytes", "FLOPs", "GB", "GFLOP", "ms", "share"):
            text = heading in ("term", "bytes", "FLOPs")
            table.add_column(heading, justify="left" if text else "right", overflow="fold")
        formulas = {term.name: (str(term.bytes), str(term.flops)) for term in self.cost.terms}
        for time in self.prediction.terms:
            table.add_row(
                time.name,
                *formulas.get(time.name, ("", "")),
                f"{time.bytes / 1e9:.3g}",
                f"{time.flops / 1e9:.3g}",
                f"{time.seconds * 1e3:.3g}",
                f"{time.seconds / self.prediction.seconds:.0%}",
            )
        return table


def explain(
    cost: IterationCost,
    config: SpecConfig,
    lengths: int | Sequence[int],
    batch: int,
    device: torch.device | str | Ceilings,
) -> Explanation:
    """Predict the mean iteration of a workload.

    Args:
        cost: of the compiled model, see `passes.cost.graph.graph_cost`.
        config: its settings; k, budget and drafter count.
        lengths: cached length of the requests, or a sample of their lengths, of which the mean counts.
        batch: requests decoded together.
        device: a CUDA device, the name of a known one ("H200"), or its `Ceilings`.

    Raises:
        CeilingsError: the device is unknown.
        AdviceError: impossible lengths or batch.
    """
    load, ceilings = workload(lengths, batch), ceilings_of(device)
    prediction, plain = (
        predict_cycle(cost, kind, config.schedule, load.length, load.batch, ceilings)
        for kind in (cycles_of(config)[-1], *cycles_of(replace(config, draft_tokens=0)))
    )
    return Explanation(cost, config, load, ceilings.name, prediction, plain)
