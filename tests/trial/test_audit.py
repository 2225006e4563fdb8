"""The audit passes right texts and names wrong ones: a planted fault of each kind is found."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import sparsespec_compile as ss
from sparsespec_compile.errors import ConfigError, PromptError, SamplingError
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.device import step
from sparsespec_compile.runtime.host.engine import Engine
from sparsespec_compile.runtime.host.session import Session
from sparsespec_compile.trial.audit import AuditReport, Check

from ..support.models import VOCABULARY, countdown, tiny
from ..support.tokenizer import letters

DRAFTS = {"draft_tokens": 4, "min_budget": 4, "budget_ratio": 0.01}
PLAIN, STEPS, BATCH, TEXTS = (
    "pillar drafts, plain decoding",
    "steps, the graph op by op",
    "batch, another order and batch",
    "texts, model.generate",
)


def prompts(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def small(dtype=torch.float32, **settings):
    return tiny("qwen3", num_hidden_layers=1, **settings).to(dtype)


def audited(model, new_tokens=16, config=None, **settings):
    fast = ss.optimize(model, ss.SpecConfig(**(DRAFTS if config is None else config)))
    return ss.audit(fast, prompts(3, 40), max_new_tokens=new_tokens, progress=False, **settings)


def wrong(report):
    """Names of the checks that found a wrong text."""
    return {check.name for check in report.checks if check.wrong}


class TestRightTexts:
    def test_in_float32_are_equal(self):
        report = audited(small())
        assert (report.verdict, report.passed, report.noise) == ("equal", True, None)
        assert [check.name for check in report.checks] == [PLAIN, STEPS, BATCH, TEXTS]
        assert all((check.texts, check.tokens) == (4, 4 * 16) for check in report.checks)
        assert 0 < report.checks[0].accepted < report.checks[0].drafts
        assert not report.unproven
        assert report.environment["settings"]["draft_tokens"] == 4
        json.dumps(report.figures())

    def test_of_auto_are_checked_with_drafts_that_it_may_not_choose(self):
        report = audited(small(), config={"min_budget": 4, "max_draft_tokens": 3})
        names = [check.name for check in report.checks]
        assert names[:3] == ["chosen drafts, plain decoding", PLAIN, "ngram drafts, plain decoding"]
        assert report.checks[1].drafts > 0
        assert report.verdict == "equal"
        untested = [check.name for check in report.checks[:3] if check.drafts == check.accepted]
        assert [note.partition(":")[0] for note in report.unproven] == untested, (
            "one drafter does not speak for another"
        )

    def test_of_passes_that_judge_proposals(self):
        report = audited(small(), config={"min_budget": 4, "draft_tokens": 4, "draft_proposals": 2})
        assert report.verdict == "equal"
        assert report.checks[0].drafts > report.checks[0].accepted > 0

    def test_of_which_one_drafter_was_never_wrong_are_named(self):
        def check(name, drafts, accepted):
            return Check(name, 4, 64, drafts, accepted, ())

        checks = check(PLAIN, 20, 20), check("ngram drafts, plain decoding", 9, 3), check(STEPS, None, None)
        assert AuditReport(checks, None, None, {}).unproven == [f"{PLAIN}: no wrong draft was verified"]

    def test_that_put_nothing_to_the_test_are_named(self):
        report = audited(small(), new_tokens=2)
        assert report.unproven == [f"{PLAIN}: no draft was verified"]

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2"])
    def test_in_bfloat16_part_by_rounding_alone(self, family):
        model = tiny(family).to(torch.bfloat16)
        report = audited(model, new_tokens=160)
        assert report.verdict in ("equal", "rounding")
        parted = [parting for check in report.checks for parting in check.partings]
        assert all(parting.gap <= parting.allowed for parting in parted)
        assert not parted or report.power > 0.5

    def test_end_where_the_model_ends_them(self):
        model = small()
        text = model.generate(torch.tensor([prompts(3)[0]]), max_new_tokens=16, do_sample=False, pad_token_id=0)[0]
        model.generation_config.eos_token_id = int(text[10])
        report = audited(model)
        assert report.verdict == "equal"
        assert report.checks[0].tokens < 4 * 16


def rounding_by_batch(forward, size):
    """Logits that are off by `size`, in a way that depends on the number of rows in the step."""

    def run(*inputs):
        logits = forward(*inputs)
        generator = torch.Generator().manual_seed(logits.shape[1] + int(inputs[0].sum()))
        return logits + size * torch.randn(logits.shape, generator=generator).to(logits.dtype)

    return run


def with_forward(fast, change):
    """The engine runs `change(forward)`; the graph that the audit calls op by op stays."""
    target = fast._engine.target
    fast._engine = Engine(replace(target, forward=change(target.forward)), fast.spec_config)
    return fast


class TestRounding:
    """A tie is told from a wrong text by the noise of HuggingFace's own logits."""

    def audited_with(self, size):
        fast = with_forward(
            ss.optimize(small(torch.bfloat16), ss.SpecConfig(**DRAFTS)), lambda f: rounding_by_batch(f, size)
        )
        return ss.audit(fast, prompts(3, 40), max_new_tokens=40, progress=False)

    @pytest.mark.slow
    def test_errors_of_the_size_of_rounding_are_ties(self):
        report = self.audited_with(0.02)
        assert report.verdict in ("rounding", "equal")

    def test_larger_ones_are_wrong(self):
        report = self.audited_with(2.0)
        assert report.verdict == "wrong"
        assert report.power > 0.5


def spoiled(change):
    """`accept` with logits that `change(state, inputs, placed, logits, slot, position, is_draft)` alters first."""
    accept = step.accept

    def run(state, inputs, placed, logits, logit_rows, *rest):
        row = logit_rows.clamp(min=0).long()
        slot, position = placed.slot[row].clamp(max=state.capacity.slots - 1), placed.position[row]
        nth = torch.arange(len(row)) - inputs.logit_start[slot]
        verified = (inputs.mode[slot] == int(Mode.VERIFY)) & (logit_rows >= 0)
        return accept(
            state,
            inputs,
            placed,
            change(state, logits.clone(), slot, position, nth, verified, placed.rows[slot]),
            logit_rows,
            *rest,
        )

    return run


class TestPlantedFaults:
    def test_a_wrong_verification(self, monkeypatch):
        """Rows behind the first of a verification draw from their neighbours' logits."""

        def change(state, logits, slot, position, nth, verified, rows):
            late = verified & (nth == 1)
            return torch.where(late[:, None], logits.roll(1, dims=1), logits)

        monkeypatch.setattr(step, "accept", spoiled(change))
        report = audited(small())
        assert {PLAIN, TEXTS} <= wrong(report)
        assert not report.passed

    def test_a_draft_that_is_accepted_wrongly(self, monkeypatch):
        def change(state, logits, slot, position, nth, verified, rows):
            taken = verified & (nth < rows - 1) & (position % 5 == 0)
            drafted = torch.zeros_like(logits).scatter_(1, state.tokens[slot, position + 1][:, None].long(), 1e4)
            return torch.where(taken[:, None], drafted, logits)

        monkeypatch.setattr(step, "accept", spoiled(change))
        report = audited(small())
        assert {PLAIN, TEXTS} <= wrong(report)

    def test_a_stale_page(self, monkeypatch):
        """Weights change in place, and pages that the old ones have computed are found."""
        monkeypatch.setattr(Session, "_follow_weights", lambda self: None)
        model = small()
        fast = ss.optimize(model, ss.SpecConfig(**DRAFTS))
        fast.generate_batch(prompts(3, 40), ss.SamplingParams(max_new_tokens=4))
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(-0.5)
        report = ss.audit(fast, prompts(3, 40), max_new_tokens=16, progress=False)
        assert {PLAIN, STEPS, TEXTS} <= wrong(report)

    def test_a_compiled_step_that_differs(self):
        """Plain decoding by the same compiled code is as wrong; the graph op by op, and HuggingFace, are not."""

        def change(forward):
            def run(*inputs):
                logits = forward(*inputs)
                off = inputs[1][0, inputs[2]] % 7 == 0
                return torch.where(off[None, :, None], logits.roll(1, dims=2), logits)

            return run

        report = ss.audit(
            with_forward(ss.optimize(small(), ss.SpecConfig(**DRAFTS)), change),
            prompts(3, 40),
            max_new_tokens=16,
            progress=False,
        )
        assert wrong(report) == {STEPS, TEXTS}

    def test_texts_that_depend_on_their_batch(self):
        """More requests in a step give other logits."""

        def change(forward):
            def run(*inputs):
                logits, full = forward(*inputs), len(inputs[2]) > 2
                return logits.roll(1, dims=2) if full else logits

            return run

        config = ss.SpecConfig(draft_tokens=0)
        report = ss.audit(
            with_forward(ss.optimize(small(), config), change), prompts(3, 40), max_new_tokens=12, progress=False
        )
        assert BATCH in wrong(report)

    def test_a_text_that_ends_early(self, monkeypatch):
        from sparsespec_compile.trial import audit as auditing

        generate = auditing._generate

        def cut(*arguments):
            written = generate(*arguments)
            return replace(written, texts=[written.texts[0][:-1], *written.texts[1:]])

        monkeypatch.setattr(auditing, "_generate", cut)
        report = audited(small())
        (parting,) = report.checks[-1].partings
        assert (parting.place, parting.other, parting.wrong) == (15, None, True)
        assert json.loads(json.dumps(report.figures()))["checks"][-1]["partings"][0]["gap"] is None

    def test_logits_that_are_not_numbers(self):
        """A comparison with NaN must not pass."""
        model = small()
        fast = ss.optimize(model, ss.SpecConfig(**DRAFTS))
        broken = with_forward(fast, lambda forward: lambda *inputs: forward(*inputs) * float("nan"))
        assert ss.audit(broken, prompts(3), max_new_tokens=8, progress=False).verdict == "wrong"


class TestTheModelAndItsEngine:
    def test_stay_as_they_were(self):
        model = small()
        fast = ss.optimize(model, ss.SpecConfig(**DRAFTS))
        before = fast.generate_batch(prompts(3), ss.SamplingParams(max_new_tokens=12))
        model.generation_config.max_length = 19
        config, engine = model.generation_config, fast._engine
        ss.audit(fast, prompts(3), max_new_tokens=8, progress=False)
        assert model.generation_config is config
        assert model.generation_config.max_length == 19
        assert fast._engine is engine
        again = fast.generate_batch(prompts(3), ss.SamplingParams(max_new_tokens=12))
        assert [one.token_ids for one in again] == [one.token_ids for one in before]

    def test_what_cannot_be_audited_is_refused(self):
        fast = ss.optimize(small())
        for given, error, says in (
            ([], PromptError, "at least one"),
            ("text", PromptError, "Give a list of prompts"),
            (["text"], PromptError, "needs a tokenizer"),
        ):
            with pytest.raises(error, match=says):
                ss.audit(fast, given, progress=False)
        with pytest.raises(SamplingError, match="must not be 0"):
            ss.audit(fast, prompts(3), temperature=0.0, progress=False)
        with pytest.raises(SamplingError, match="max_new_tokens must be"):
            ss.audit(fast, prompts(3), max_new_tokens=0, progress=False)
        ranks = replace(fast._engine.target, ranks=object())
        fast._engine.target = ranks
        with pytest.raises(ConfigError, match="Ranks share the model"):
            ss.audit(fast, prompts(3), progress=False)

    def test_texts_and_the_report_can_be_read(self, capsys):
        report = ss.audit(
            ss.optimize(small(), ss.SpecConfig(**DRAFTS)),
            ["abcdef"],
            max_new_tokens=8,
            tokenizer=letters(),
            progress=False,
        )
        Console(width=160).print(report)
        printed = capsys.readouterr().out
        for said in (PLAIN, "drafts right", "verdict: every text is equal"):
            assert said in printed


@pytest.mark.gpu
def test_captured_steps_on_a_gpu():
    """bf16 texts of a trained model: captured and compiled, beside the graph op by op and HuggingFace's own."""
    model, input_ids, _ = countdown("solve 21 6 24 2 for 102\n", "solve 39 36 32 40 for 75\n")
    fast = ss.optimize(model.to("cuda", torch.bfloat16))
    report = ss.audit(fast, [row[row != 0].tolist() for row in input_ids], max_new_tokens=400, progress=False)
    assert report.passed
    assert any(check.drafts for check in report.checks)
