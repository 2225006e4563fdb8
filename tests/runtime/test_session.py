"""The loop around the step: what is enqueued when, how often it compiles, what it takes, and public steps."""

import gc
import weakref
from functools import partial
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch._dynamo.testing import CompileCounter

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import ConfigError, GraphMemoryWarning, MemoryPlanError, PoolTooSmallError
from sparsespec_compile.kernels.launch import Promise
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.requests.sampling_params import SamplingParams
from sparsespec_compile.runtime.build import MemoryPlan, Target
from sparsespec_compile.runtime.device.drafters import cycles_of
from sparsespec_compile.runtime.device.graphs import StepRunner, row_counts
from sparsespec_compile.runtime.device.inputs import InputPacker, PageUpdate, Work
from sparsespec_compile.runtime.device.sampling import DrawParams
from sparsespec_compile.runtime.device.step import Variant
from sparsespec_compile.runtime.host.engine import Engine
from sparsespec_compile.runtime.host.frames import Frame
from sparsespec_compile.runtime.host.phases import GROUPED_ROWS
from sparsespec_compile.runtime.host.scheduler import Scheduler
from sparsespec_compile.runtime.host.session import decoding_rows

from ..support.toy import Toy, requests_of, run, state_of, stepping


@pytest.fixture(scope="module")
def toy():
    return Toy()


@pytest.mark.parametrize("overlap", [True, False])
def test_an_iteration_is_enqueued_before_the_results_of_the_last_are_read(toy, monkeypatch, overlap):
    events = []
    step, read = StepRunner.__call__, Frame.read

    def note_step(runner, *arguments):
        events.append("step")
        step(runner, *arguments)

    def note_read(frame, **arguments):
        events.append("read")
        return read(frame, **arguments)

    monkeypatch.setattr(StepRunner, "__call__", note_step)
    monkeypatch.setattr(Frame, "read", note_read)
    requests = requests_of((5, 30), 40)
    assert run(toy.engine(draft_tokens=4, min_budget=4, overlap=overlap), requests) == list(map(toy.decode, requests))
    ahead = [events[: i + 1].count("step") - events[: i + 1].count("read") for i in range(len(events))]
    assert max(ahead) == (2 if overlap else 1)
    assert ahead[-1] == 0
    if overlap:
        assert ahead[1:-1] == ([2, 1] * len(ahead))[: len(ahead) - 2]  # there is always one under way


def test_texts_that_end_at_once_make_room_while_an_iteration_is_under_way(toy):
    """A slot's new owner never sees its old owner's late tokens."""
    requests = requests_of((5, 9, 3, 30, 12, 7, 2, 16), 3) + requests_of((20, 4), 25)
    engine = toy.engine(draft_tokens=4, min_budget=4, max_requests=2)
    assert run(engine, requests) == [toy.decode(request) for request in requests]


def test_no_recompilation_whatever_the_batch(toy):
    counter = CompileCounter()
    config = SpecConfig(draft_tokens=4, min_budget=4)
    compiler = partial(torch.compile, backend=counter, dynamic=True)
    target = Target(
        toy.forward(config.page_size), toy.layout(config.page_size), torch.float32, torch.device("cpu"), compiler
    )
    engine = Engine(target, config)
    run(engine, requests_of((5, 9, 30, 2, 2, 2, 2, 2), 40))
    compiled = counter.frame_count
    assert compiled > 0
    for lengths in ((3,), (5,) * 8, (40, 2), (9, 30, 1)):
        requests = requests_of(lengths, 20)
        assert run(engine, requests) == [toy.decode(request) for request in requests]
    assert counter.frame_count == compiled


def test_padded_row_counts():
    for most in (1, 2, 9, 17, 72, 576, 2624):
        sizes = row_counts(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == max(most, 2)
        assert all(size < 64 or above - size <= max(96, size / 4) for size, above in pairwise(sizes))
    assert len(row_counts(2624)) < 20


class Recorder:
    """Notes what is captured and replayed, by its rows and promise, in place of CUDA graphs; nothing runs."""

    def __init__(self):
        self.events = []

    def capture(self, work, warm_ups):
        rows, _, variant = work.args
        self.events.append((rows, variant.promise))
        return self

    def replay(self):
        self.events.append("replay")


def recorded(toy, monkeypatch, **settings):
    """A runner for at most 100 rows of two slots, and what it captures and replays."""
    monkeypatch.setattr("sparsespec_compile.runtime.device.graphs.row_counts", lambda most: row_counts(100))
    graphs = Recorder()
    return StepRunner(toy.engine(**settings).capture(2, 64)._runner.step, graphs), graphs.events


def test_steps_that_decode_are_captured_beforehand(toy, monkeypatch):
    """The largest first, for the others fit into its memory; none twice; one row of each slot in steps of their own.

    In the largest a prompt may end.
    """
    runner, events = recorded(toy, monkeypatch)
    several = Promise.ONLY_VERIFICATIONS_SCORED
    runner.prepare({several: range(1, 11), Promise.SMALL_TILES: range(1, 3)})
    assert events == [(100, Promise.NOTHING), (2, several), (16, several), (2, Promise.SMALL_TILES)]
    runner.prepare({several: range(1, 34), Promise.SMALL_TILES: range(1, 3)})
    assert events[4:] == [(64, several)]
    plain, events = recorded(toy, monkeypatch)
    plain.prepare({Promise.SMALL_TILES: range(1, 3)})
    assert events == [(100, Promise.NOTHING), (2, Promise.SMALL_TILES)]


def test_what_reads_no_scores_takes_kernels_that_give_none(toy, monkeypatch):
    runner, events = recorded(toy, monkeypatch, drafter="window")
    runner.prepare({Promise.NO_SCORES: [10]})
    assert events == [(100, Promise.NO_SCORES), (16, Promise.NO_SCORES)]


def test_the_largest_step_is_captured_first_and_for_any_rows(toy, monkeypatch):
    """The others fit into its memory; of single rows there are never so many."""
    runner, events = recorded(toy, monkeypatch)
    for rows, variant in ((2, Variant(promise=Promise.SMALL_TILES)), (60, Variant())):
        runner(rows, rows, variant)
    largest, few = (100, Promise.NOTHING), (2, Promise.SMALL_TILES)
    assert events == [largest, few, "replay", (64, Promise.NOTHING), "replay"]


def test_drafts_with_8_bit_weights_are_captured_beside_other_single_rows(toy, monkeypatch):
    runner, events = recorded(toy, monkeypatch, draft_weights="int8")
    single, drafts = (Variant(promise=Promise.SMALL_TILES, draft_weights=both) for both in (False, True))
    runner(2, 2, drafts)
    largest, few = (100, Promise.NOTHING), (2, Promise.SMALL_TILES)
    assert events == [largest, few, "replay"]
    assert [key[1].draft_weights for key in runner._captured] == [False, True], "the largest does all that others do"
    runner.prepare({Promise.SMALL_TILES: range(1, 3)})
    assert events[3:] == [few]
    runner(2, 2, single)
    assert events[4:] == ["replay"]
    drafted = [runner.step.variant([Work(0, Mode.DRAFT, 1)] * rows).draft_weights for rows in (0, 1, 64, 65)]
    assert drafted == [False, True, True, False], "beyond, 8 bits save nothing"
    assert not runner.step.variant([Work(0, Mode.DRAFT, 1), Work(1, Mode.VERIFY, 1)]).draft_weights


def test_a_capture_that_finds_no_memory_leaves_the_inputs_as_they_were(toy, monkeypatch):
    runner, _ = recorded(toy, monkeypatch)
    inputs = runner.step.inputs
    inputs.flat.copy_(torch.arange(inputs.flat.numel()))
    expected = inputs.flat.clone()

    def refuse(work, warm_ups):
        assert not inputs.mode.any(), "the runs before a capture have no work"
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Recorder, "capture", lambda graphs, work, warm_ups: refuse(work, warm_ups))
    with pytest.raises(PoolTooSmallError, match="No memory to capture a step of 100 rows"):
        runner(60, 60, Variant())
    assert torch.equal(inputs.flat, expected)


def test_the_largest_step_stands_in_for_one_that_there_is_no_memory_to_capture(toy, monkeypatch):
    runner, events = recorded(toy, monkeypatch)
    capture = Recorder.capture

    def refuse_small(graphs, work, warm_ups):
        if work.args[0] < 100 or work.args[2].logprobs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return capture(graphs, work, warm_ups)

    monkeypatch.setattr(Recorder, "capture", refuse_small)
    with pytest.warns(GraphMemoryWarning, match="capture a step of 16 rows"):
        runner.prepare({Promise.ONLY_VERIFICATIONS_SCORED: [10]})
    runner(10, 10, Variant(promise=Promise.ONLY_VERIFICATIONS_SCORED))
    assert events == [(100, Promise.NOTHING), "replay"]
    with pytest.raises(PoolTooSmallError, match="capture a step of 16 rows"):
        runner(10, 10, Variant(logprobs=True))


def test_drafts_and_plain_decoding_alone_are_a_variant_of_their_own(toy, monkeypatch):
    """In which nobody's pillars are renewed; everything else runs as it does in any step."""
    planned, variants, renewed = [], [], []
    plan, step = Scheduler.plan, StepRunner.__call__

    def note_plan(scheduler):
        work = plan(scheduler)
        if work or scheduler.kv_cache.updates:
            planned.append([item for _, item in work])
        return work

    def note_step(runner, rows, logits, variant, *functions):
        updates = ((scores, update),) = runner.step._updates
        runner.step._updates = [(scores, lambda *given: (renewed.append(len(variants)), update(*given)))]
        step(runner, rows, logits, variant, *functions)
        runner.step._updates = updates
        variants.append(variant)

    monkeypatch.setattr(Scheduler, "plan", note_plan)
    monkeypatch.setattr(StepRunner, "__call__", note_step)
    requests = requests_of((5, 30, 12), 40)
    engine = toy.engine(draft_tokens=4, min_budget=4, schedule="in_phase")
    assert run(engine, requests) == list(map(toy.decode, requests))
    single = [all(item.rows == 1 and not item.scored for item in work) for work in planned]
    prompts = [any(item.scored and item.mode == Mode.PREFILL for item in work) for work in planned]
    for variant, alone, prompt_ends in zip(variants, single, prompts, strict=True):
        several = Promise.NOTHING if prompt_ends else Promise.ONLY_VERIFICATIONS_SCORED
        assert variant.promise is (Promise.SMALL_TILES if alone else several)
    assert len(variants) > sum(single) + sum(prompts) > sum(single)
    assert len(single) > sum(single) > len(single) // 2
    assert renewed == [place for place, alone in enumerate(single) if not alone]


def test_rows_of_decoding():
    def rows(slots, **settings):
        return {promise.name: max(rows) for promise, rows in decoding_rows(slots, SpecConfig(**settings)).items()}

    def scored(slots, **settings):
        return rows(slots, **settings)["ONLY_VERIFICATIONS_SCORED"]

    together = GROUPED_ROWS // 9
    assert rows(64, draft_tokens=0) == {"SMALL_TILES": 64}
    assert rows(64, draft_tokens=8) == {"ONLY_VERIFICATIONS_SCORED": 64 + 8 * together, "SMALL_TILES": 64}
    assert scored(64, draft_tokens=8, schedule="in_phase") == 64 * 9
    assert scored(64, draft_tokens=8, schedule="balanced") == 64 + 8 * 8
    assert scored(2, draft_tokens=8) == 2 * 9
    assert scored(512, draft_tokens=8) == 512 + 8 * 57
    assert scored(64, draft_tokens="auto", max_draft_tokens=8) == 64 + 8 * max(together, 64 // 2)
    assert rows(64, draft_tokens=8, drafter="window") == {"NO_SCORES": 64 + 8 * together, "SMALL_TILES": 64}
    assert rows(64, draft_tokens=8, drafter="ngram") == {"NO_SCORES": 64 * 9, "SMALL_TILES": 64}


def test_few_steps_of_drafts_from_the_text_are_captured_beforehand():
    """Those that "auto" may soon take, of more rows than which cost a lot; it has no more of others than before."""

    def rows(slots, **settings):
        return decoding_rows(slots, SpecConfig(draft_tokens="auto", **{"draft_proposals": 0, **settings}))

    drafts = [cycle.drafts for cycle in cycles_of(SpecConfig(drafter="ngram")) if cycle.drafts]
    few = {slots: [slots * (one + 1) for one in drafts if slots * (one + 1) <= GROUPED_ROWS] for slots in (64, 16, 1)}
    assert {slots: rows(slots)[Promise.NO_SCORES] for slots in few} == few
    assert [len(few[slots]) < len(drafts) for slots in few] == [True, False, False]
    assert Promise.NO_SCORES not in rows(200)
    for slots in (1, 64):
        both, pillars = rows(slots), rows(slots, drafter="pillar")
        assert {promise: both[promise] for promise in pillars} == pillars
    proposed = [rows(slots, draft_proposals="auto")[Promise.SMALL_TILES] for slots in (1, 20, 64, 200)]
    assert [max(numbers) for numbers in proposed] == [6, 120, GROUPED_ROWS, GROUPED_ROWS]
    assert all(numbers == [*range(1, max(numbers) + 1)] for numbers in proposed)


def test_inputs_may_be_written_without_fill(toy):
    """By a second packer, as a loop of one's own may have one."""
    tokens = []
    for own in (False, True):
        step = toy.engine(draft_tokens=4).capture(2, 64)
        step.begin(0, 64)
        prompt = Work(0, Mode.PREFILL, rows=6, tokens=[5, 1, 4, 2, 3, 6], logits=1)
        if own:
            packer = InputPacker(step.inputs.sizes)
            packer.admit(0, 64, DrawParams())
            counts = packer.pack([prompt], [])
            step.inputs.flat.copy_(torch.from_numpy(packer.flat))
            tokens.append(step.replay(*counts).tokens[0].tolist())
        else:
            step.fill([prompt])
            tokens.append(step.replay().tokens[0].tolist())
    assert tokens[0] == tokens[1]
    assert tokens[0][0] == 1


def test_an_engine_captures_before_it_runs(toy, monkeypatch):
    prepared = []

    def prepare(runner, rows, **how):
        prepared.append({promise.name: max(numbers) for promise, numbers in rows.items()})
        if len(prepared) == 1:
            raise PoolTooSmallError("no memory")

    monkeypatch.setattr(StepRunner, "prepare", prepare)
    engine = toy.engine(draft_tokens=4, min_budget=4)
    with pytest.raises(PoolTooSmallError, match="no memory"):
        run(engine, requests_of((3,) * 8, 20))
    run(engine, requests_of((3,), 20))
    # What failed is not asked for again.
    several = "ONLY_VERIFICATIONS_SCORED"
    assert prepared == [{several: 8 * 5, "SMALL_TILES": 8}, {several: 5, "SMALL_TILES": 1}]


def test_a_state_serves_calls_of_different_shapes_without_being_rebuilt(toy):
    engine = toy.engine(draft_tokens=4, min_budget=4)
    run(engine, requests_of((3,) * 8, 20))
    run(engine, requests_of((300,), 20))
    state = state_of(engine)
    run(engine, requests_of((3,) * 8, 20))
    run(engine, requests_of((300,), 20))
    assert state_of(engine) is state


def test_scores_are_kept_for_the_requests_that_verify_together_only(toy):
    config = {"draft_tokens": 8, "min_budget": 4}
    engine = toy.engine(**config)
    requests = requests_of([5] * 64, 20)
    texts = run(engine, requests)
    assert state_of(engine).scores.shape[0] == GROUPED_ROWS // 9
    everyone = toy.engine(**config, schedule="in_phase")
    assert run(everyone, requests_of([5] * 64, 20)) == texts
    assert state_of(everyone).scores.shape[0] == 64


def test_memory_plan_counts_what_is_allocated(toy):
    engine = toy.engine(draft_tokens=4, min_budget=4)
    run(engine, requests_of((5, 9), 20))
    state = state_of(engine)
    parts = engine.memory_plan.parts
    assert parts["KV pool"] == state.pool.nbytes
    assert parts["attention scores"] == state.scores.nbytes
    assert parts["pillar index"] == state.pillar_index.nbytes
    assert parts["logits processing"] == state.processing.nbytes
    assert parts["tokens and page table"] == state.tokens.nbytes + state.page_table.nbytes
    console = Console(width=100)
    with console.capture() as shown:
        console.print(engine.memory_plan)
    assert "KV pool" in shown.get()


def test_a_plan_that_does_not_fit_is_refused_with_its_figures():
    MemoryPlan({"weights": 2**30, "KV pool": 2**31}, 3 * 2**30).require()
    with pytest.raises(
        MemoryPlanError, match=r"2.50 GiB of the device may be used, and 3.00 are needed: weights 1.00, KV pool 2.00\."
    ):
        MemoryPlan({"weights": 2**30, "KV pool": 2**31}, 5 * 2**29).require()


class TestCapturedStep:
    """A loop of one's own. `examples/custom_loop.py` is the longer one."""

    def decode(self, step, request, updates=()):
        """Plain decoding by replays: a prompt, then verifications of one row."""
        step.begin(0, request.max_length, request.params)
        prompt = request.prompt
        step.fill([Work(0, Mode.PREFILL, rows=len(prompt), tokens=prompt, logits=1)], updates)
        text = []
        while len(text) < request.max_new_tokens:
            count, *tokens = step.replay().tokens[0].tolist()
            assert count == 1
            text.append(tokens[0])
            step.fill([Work(0, Mode.VERIFY, rows=1, logits=1)])
        return text

    def test_replays_decode(self, toy):
        engine = toy.engine(draft_tokens=4, min_budget=4)
        step = engine.capture(2, 64)
        for request in (*requests_of((7,), 12), *requests_of((20,), 30, temperature=0.9)):
            assert self.decode(step, request) == toy.decode(request)

    def test_what_filled_the_inputs_decides_on_the_variant(self, toy, monkeypatch):
        step, variants = toy.engine(draft_tokens=4, min_budget=4).capture(2, 64), []
        for slot in range(2):
            step.begin(slot, 64)
        step.fill([Work(slot, Mode.PREFILL, rows=1, tokens=(5,), logits=1) for slot in range(2)])
        monkeypatch.setattr(StepRunner, "__call__", lambda _, *given: variants.append(given[2].promise))
        single, rows = Work(0, Mode.DRAFT, rows=1, logits=1), Work(1, Mode.VERIFY, rows=5, logits=5, scored=5)
        prompt = Work(0, Mode.PREFILL, rows=2, tokens=(3, 4), logits=1, scored=2)
        for work in ([single], [single, rows], [], [single._replace(scored=1)], [prompt, rows]):
            step.fill(work)
            step.replay()
        for counts in ((1, 1), (1, None), (None, 1)):  # as if written by hand
            step.fill([single])
            step.replay(*counts)
        several = Promise.ONLY_VERIFICATIONS_SCORED
        filled = [Promise.SMALL_TILES, several, Promise.SMALL_TILES, several, Promise.NOTHING]
        assert variants == [*filled, *[Promise.NOTHING] * 3]

    def test_pages_may_lie_anywhere(self, toy):
        step = toy.engine(draft_tokens=4, page_size=4).capture(2, 64)
        (request,) = requests_of((7,), 12)
        moved = [PageUpdate(0, page, 31 - page) for page in range(5)]
        assert self.decode(step, request, moved) == toy.decode(request)
        assert step.state.page_table[0, 0, :5].tolist() == [31, 30, 29, 28, 27]

    def test_groups_of_layers_have_pages_of_their_own(self):
        """A window's pages may be given back when no row can see them any more, here to the same request."""
        toy = Toy(windows=(0, 6, 6))
        step = toy.engine(draft_tokens=4, page_size=4).capture(2, 64)
        assert step.state.page_table.shape[0] == 3
        assert len(step.state.page_table[:, :2].unique()) == 3 * 2 * 16
        (request,) = requests_of((30,), 12)
        second = step.state.page_table[1, 0, :4].tolist()
        again = [PageUpdate(0, 8 + page, physical, group=1) for page, physical in enumerate(second)]
        assert self.decode(step, request, again) == toy.decode(request)
        with pytest.raises(ConfigError, match="group must be an integer from 0 to 2, got 3"):
            step.fill([], [PageUpdate(0, 0, 0, group=3)])

    def test_inputs_and_results_are_static(self, toy):
        step = toy.engine(draft_tokens=4).capture(3, 64)
        addresses = [tensor.data_ptr() for tensor in (step.inputs.flat, *step.results, step.state.pool)]
        self.decode(step, requests_of((7,), 12)[0])
        assert addresses == [tensor.data_ptr() for tensor in (step.inputs.flat, *step.results, step.state.pool)]
        assert step.inputs.mode.tolist() == [Mode.VERIFY, Mode.IDLE, Mode.IDLE]
        assert step.results.tokens.shape == (3, 6)

    def test_one_text_of_any_length(self, toy):
        step = toy.engine(draft_tokens=4, pool_tokens=64).capture(1, 100)
        (request,) = requests_of((7,), 12)
        assert self.decode(step, request) == toy.decode(request)
        toy.engine(draft_tokens=4).capture(1, 1).replay()

    def test_more_than_fits_is_refused(self, toy):
        step = toy.engine(draft_tokens=8, min_budget=4).capture(40, 64)
        for slot in range(40):
            step.begin(slot, 64)
        prompt = [Work(slot, Mode.PREFILL, rows=2, tokens=[1, 2], logits=1, scored=2) for slot in range(40)]
        most = GROUPED_ROWS // 9
        with pytest.raises(ConfigError, match=f"has 40 scored requests, the step holds {most}"):
            step.fill(prompt)
        step.fill(prompt[:most])
        with pytest.raises(ConfigError, match="packed rows"):
            step.fill([Work(0, Mode.PREFILL, rows=10_000, tokens=[1] * 10_000)])
        window = toy.engine(draft_tokens=8, drafter="window").capture(40, 64)
        for slot in range(40):
            window.begin(slot, 64)
        window.fill(prompt)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (Work(2, Mode.DRAFT, 1), "slot must be an integer from 0 to 1, got 2"),
            (Work(-1, Mode.DRAFT, 1), "slot must be an integer from 0 to 1, got -1"),
            (Work(1, Mode.DRAFT, 1), r"Slot 1 holds no text yet. Call begin\(1, max_length\)"),
            (Work(0, Mode.IDLE, 1), "mode must be one of Mode.DRAFT, Mode.VERIFY, Mode.PREFILL"),
            (Work(0, 7, 1), "mode must be one of"),
            (Work(0, Mode.DRAFT, 2), "rows must be an integer from 1 to 1, got 2"),
            (Work(0, Mode.VERIFY, 6), "rows must be an integer from 1 to 5, got 6"),
            (Work(0, Mode.VERIFY, 0), "rows must be an integer from 1 to 5, got 0"),
            (Work(0, Mode.VERIFY, 2, logits=3), "logits must be an integer from 2 to 2, got 3"),
            (Work(0, Mode.VERIFY, 2, logits=1), "logits must be an integer from 2 to 2, got 1"),
            (Work(0, Mode.PREFILL, 2, tokens=[1, 2], logits=2), "logits must be an integer from 0 to 1, got 2"),
            (Work(0, Mode.VERIFY, 2, logits=2, scored=3), "scored must be an integer from 0 to 2, got 3"),
            (Work(0, Mode.DRAFT, 1, offset=5, logits=1), "offset must be an integer from 0 to 4, got 5"),
            (Work(0, Mode.VERIFY, 2, offset=1, logits=2), "offset must be an integer from 0 to 0, got 1"),
            (Work(0, Mode.PREFILL, 2, offset=5, tokens=[1, 2]), "offset must be an integer from 0 to 4, got 5"),
            (Work(0, Mode.PREFILL, 2, offset=39, tokens=[1, 2]), "offset must be an integer from 0 to 38, got 39"),
            (Work(0, Mode.PREFILL, 41, tokens=[1] * 41), "rows must be an integer from 1 to 40, got 41"),
            (Work(0, Mode.PREFILL, 5, tokens=[1, 2, 3]), "tokens must be one for each of the 5 rows, got 3"),
            (Work(0, Mode.DRAFT, 1, logits=1, tokens=[1]), "tokens must be none: they are on the device, got 1"),
            (Work(0, Mode.PREFILL, 1, tokens=[50]), "tokens must be an integer from 0 to 49, got 50"),
            (Work(0, Mode.PREFILL, 1, tokens=[1.5]), "tokens must be an integer from 0 to 49, got 1.5"),
            ("draft", "fill takes Work, got str"),
        ],
    )
    def test_work_that_no_slot_can_do_is_refused(self, toy, wrong, message):
        step = toy.engine(draft_tokens=4, page_size=4).capture(2, 64, vocabulary=50)
        step.begin(0, 40)
        step.fill([Work(0, Mode.PREFILL, 4, tokens=[1, 2, 3, 4], logits=1)])
        with pytest.raises(ConfigError, match=message):
            step.fill([wrong])

    def test_a_new_text_begins_with_its_prompt(self, toy):
        """Its slot still holds the length and the cache of the text before."""
        step = toy.engine(draft_tokens=4, page_size=4).capture(1, 64)
        request = requests_of((7,), 12)[0]
        for _ in range(2):
            step.begin(0, 40)
            for work in (Work(0, Mode.VERIFY, 1, logits=1), Work(0, Mode.DRAFT, 1, logits=1)):
                with pytest.raises(ConfigError, match="Slot 0 has no token to continue from"):
                    step.fill([work])
            step.fill([Work(0, Mode.PREFILL, 3, tokens=request.prompt[:3])])
            with pytest.raises(ConfigError, match="Slot 0 has no token to continue from"):
                step.fill([Work(0, Mode.VERIFY, 1, logits=1)])
            step.replay()
            step.fill([Work(0, Mode.PREFILL, 4, offset=3, tokens=request.prompt[3:], logits=1)])
            assert step.replay().tokens[0, 1] == toy.decode(request)[0]
            step.fill([Work(0, Mode.VERIFY, 1, logits=1)])
            assert step.replay().tokens[0, 1] == toy.decode(request)[1]

    def test_other_wrong_input_is_refused(self, toy):
        step = toy.engine(draft_tokens=4, page_size=4).capture(2, 64)
        with pytest.raises(ConfigError, match="slot must be an integer from 0 to 1, got 9"):
            step.begin(9, 40)
        with pytest.raises(ConfigError, match=r"from 1 to 64, got 65\. Capture a step with a larger max_length"):
            step.begin(0, 65)
        with pytest.raises(ConfigError, match="params must be DrawParams or None, got SamplingParams"):
            step.begin(0, 40, SamplingParams())
        step.begin(0, 40)
        step.fill([Work(0, Mode.PREFILL, 1, tokens=[1], logits=1)])
        draft = Work(0, Mode.DRAFT, 1, logits=1)
        with pytest.raises(ConfigError, match="Slot 0 has several Work"):
            step.fill([draft, draft])
        for update, message in (
            (PageUpdate(2, 0, 0), "slot must"),
            (PageUpdate(0, 16, 0), "page must be an integer from 0 to 15"),
            (PageUpdate(0, 0, 32), "physical must be an integer from 0 to 31"),
        ):
            with pytest.raises(ConfigError, match=message):
                step.fill([draft], [update])
        with pytest.raises(ConfigError, match="rows must be from 0 to"):
            step.replay(10**6, 1)
        with pytest.raises(ConfigError, match="logits must be from 0 to"):
            step.replay(1, 10**6)

    def test_it_does_not_disturb_the_engine(self, toy):
        engine = toy.engine(draft_tokens=4, min_budget=4)
        generation = engine.run(requests_of((5, 9), 20))
        next(generation)
        step = engine.capture(2, 64)
        assert self.decode(step, requests_of((7,), 12)[0]) == toy.decode(requests_of((7,), 12)[0])
        for _ in generation:
            pass
        assert run(engine, requests_of((3,), 9)) == [toy.decode(r) for r in requests_of((3,), 9)]


@pytest.mark.parametrize("drafter", ["pillar", "window"])
def test_no_request_sits_out(toy, drafter):
    """64 requests over 9 phases: as many iterations as a single request takes, and a cycle's spread more."""
    engine = toy.engine(draft_tokens=8, drafter=drafter, min_budget=1000)
    run(engine, requests_of([5] * 64, 45))
    assert engine.stats.iterations < 45 + 9 + 9


def test_a_single_slot_runs_one_request_at_a_time(toy):
    engine = toy.engine(draft_tokens=2, min_budget=4, max_requests=1)
    with stepping(engine, requests_of((5, 9, 12), 10)) as session:
        while session.busy:
            session.advance()
            assert len(session._scheduler.running) <= 1


def test_nothing_of_a_finished_request_is_kept(toy):
    engine = toy.engine(draft_tokens=4, min_budget=4)
    with engine.client() as client:
        requests = requests_of((5, 9, 12, 3), 20)
        client.submit(requests)
        kept = [weakref.ref(request) for request in requests]
        del requests
        for output in client:
            del output
    gc.collect()
    assert [request() for request in kept] == [None] * 4
