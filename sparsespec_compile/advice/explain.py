"""What an iteration of a compiled model reads and computes, where its time goes, and how far that is from the limit."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.jupyter import JupyterMixin
from rich.table import Table

from sparsespec_compile.advice.ceilings import Ceilings, ceilings_of
from sparsespec_compile.advice.prediction import DraftCost, Prediction, Workload, predict_cycle, workload
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.passes.cost.terms import IterationCost
from sparsespec_compile.runtime.device.drafters import Cycle, NgramDrafter, cycles_of
from sparsespec_compile.runtime.host.phases import phases_in_use

WIDTH = 80
"""Columns of what `print` shows; rich and notebooks take what room they have."""
_NGRAMS_SHOWN, _PROPOSALS_SHOWN = (1, 3, 8), (1, 3)
LEGEND = (
    "T rows, R rows with logits, D drafting and V verifying requests, L mean cached length, k drafts of a cycle, "
    "b cached positions that a draft reads"
)


@dataclass(frozen=True)
class Explanation(JupyterMixin):
    """The cost of a mean iteration in the steady state. `print` shows it in 80 columns, a notebook as HTML.

    Attributes:
        cost: bytes and FLOPs as expressions.
        config: settings of the compiled model.
        workload: mean cached length, and requests.
        device: its name.
        prediction: times at these settings.
        plain: times of plain decoding, for comparison.
        drafts: bytes and FLOPs of iterations of nothing but drafts, where they read 8-bit weights.
        ngrams: times with drafts from the text, by their number; empty where the settings allow none.
        judging: cycles whose draft iterations judge proposals, and times; empty likewise, and where the settings have
            no other cycles.
    """

    cost: IterationCost
    config: SpecConfig
    workload: Workload
    device: str
    prediction: Prediction
    plain: Prediction
    drafts: IterationCost | None = None
    ngrams: Mapping[int, Prediction] = field(default_factory=dict)
    judging: Mapping[Cycle, Prediction] = field(default_factory=dict)

    def __rich__(self) -> Group:
        return Group(self._times(), self._formulas(), *self.lines())

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, record=True)
        console.print(self)
        return console.export_text()

    def lines(self) -> list[str]:
        """The summary below the table."""
        mean, top = self.prediction, self.prediction.dominating
        kind, requests = cycles_of(self.config)[-1], self.workload.batch
        passes, phases = kind.passes, phases_in_use(self.config.schedule, kind, requests)
        return [
            LEGEND,
            f"each request verifies in one of {passes + 1} iterations; {requests} requests share {phases} of them"
            if passes
            else "all requests verify in every iteration",
            *(
                [f"iterations of nothing but drafts judge {_counted(kind.proposals, 'proposal')} of each request"]
                if kind.proposals
                else []
            ),
            f"predicted {mean.seconds * 1e3:.3g} ms an iteration; speed of light {mean.light_seconds * 1e3:.3g} ms, "
            f"{mean.roofline_share:.0%} of the prediction",
            f"longest: {top.name}, {top.seconds / mean.seconds:.0%}",
            *self._draft_lines(),
            f"plain decoding: predicted {self.plain.seconds * 1e3:.3g} ms, speed of light "
            f"{self.plain.light_seconds * 1e3:.3g} ms, longest: {self.plain.dominating.name}",
            *self._choice_lines(),
            *self._ngram_lines(),
            *self._judging_lines(),
        ]

    def _choice_lines(self) -> list[str]:
        if self.config.draft_tokens != "auto":
            return []
        return [f'"auto" chooses among {len(cycles_of(self.config))} kinds of cycles; shown is that of the most passes']

    def _ngram_lines(self) -> list[str]:
        return [
            f"{_counted(drafts, 'draft')} from the text: predicted {time.seconds * 1e3:.3g} ms, faster than plain "
            f"decoding if more than {time.seconds / self.plain.seconds - 1:.2f} of them are accepted"
            for drafts, time in self.ngrams.items()
        ]

    def _judging_lines(self) -> list[str]:
        return [
            f"{_counted(kind.passes, 'draft iteration')} that judge {_counted(kind.proposals, 'proposal')}, "
            f"for up to {kind.drafts} drafts: predicted {time.seconds * 1e3:.3g} ms"
            for kind, time in self.judging.items()
        ]

    def _draft_lines(self) -> list[str]:
        if self.drafts is None:
            return []
        products = [term for term in self.drafts.terms if term.kind == "gemm"]
        read, exact = (sum(float(t.term(term.name).bytes) for term in products) for t in (self.drafts, self.cost))
        return [f"iterations of nothing but drafts read {read / 1e9:.3g} GB of weights in place of {exact / 1e9:.3g}"]

    def _times(self) -> Table:
        load, k = self.workload, self.config.most_draft_tokens
        table = Table(
            title=f"{load.batch} requests at {load.length:,.0f} cached tokens, k = {k}, {self.device}", box=SIMPLE_HEAD
        )
        for heading in ("term", "GB", "GFLOP", "ms", "share"):
            table.add_column(heading, justify="left" if heading == "term" else "right")
        for time in self.prediction.terms:
            table.add_row(
                time.name,
                f"{time.bytes / 1e9:.3g}",
                f"{time.flops / 1e9:.3g}",
                f"{time.seconds * 1e3:.3g}",
                f"{time.seconds / self.prediction.seconds:.0%}",
            )
        table.min_width = min(len(str(table.title)), WIDTH)
        return table

    def _formulas(self) -> Table:
        table = Table("term", "bytes", "FLOPs", title="what the terms read and compute", box=SIMPLE_HEAD)
        for term in self.cost.terms:
            table.add_row(term.name, str(term.bytes), str(term.flops))
        return table


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def explain(
    cost: IterationCost,
    config: SpecConfig,
    lengths: int | Sequence[int],
    batch: int,
    device: torch.device | str | Ceilings,
    drafts: DraftCost | None = None,
) -> Explanation:
    """Predict the mean iteration of a workload.

    Args:
        cost: of the compiled model, see `passes.cost.graph.graph_cost`.
        config: its settings; k, budget and drafter count.
        lengths: cached length of the requests, or a sample of their lengths, of which the mean counts.
        batch: requests decoded together.
        device: a CUDA device, the name of a known one ("H200"), or its `Ceilings`.
        drafts: of iterations of nothing but drafts, where it is another one.

    Raises:
        CeilingsError: the device is unknown.
        AdviceError: impossible lengths or batch.
    """
    load, ceilings = workload(lengths, batch), ceilings_of(device)

    def predicted(kind: Cycle) -> Prediction:
        return predict_cycle(cost, kind, config.schedule, load.length, load.batch, ceilings, drafts)

    cycles = cycles_of(config)
    (plain,) = cycles_of(replace(config, draft_tokens=0))
    ngrams = {
        kind.drafts: predicted(kind)
        for kind in cycles
        if isinstance(kind.drafter, NgramDrafter) and kind.drafts in _NGRAMS_SHOWN
    }
    # Of the cycles with the most drafts, those with the fewest iterations.
    judging = {
        kind.proposals: kind
        for kind in reversed(cycles[:-1])
        if kind.proposals in _PROPOSALS_SHOWN and kind.drafts == cycles[-1].drafts
    }
    return Explanation(
        cost,
        config,
        load,
        ceilings.name,
        predicted(cycles[-1]),
        predicted(plain),
        None if drafts is None else drafts.cost,
        ngrams,
        {kind: predicted(kind) for kind in reversed(judging.values())},
    )
