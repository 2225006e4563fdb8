"""`generate` takes what HuggingFace's takes, gives what it gives, and refuses the rest by name."""

import copy

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

import sparsespec_compile as ss
from sparsespec_compile.errors import (
    ConfigError,
    ContextLengthError,
    ContextLengthWarning,
    CopyError,
    PoolTooSmallError,
    PromptError,
    SamplingError,
    StaleParametersError,
    StoppedError,
    UnsupportedModelError,
)

from .support.models import VOCABULARY, left_padded, tiny
from .support.tokenizer import letters

NEW = 40


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3", num_hidden_layers=1)


@pytest.fixture(scope="module")
def fast(model):
    return ss.optimize(model, ss.SpecConfig(draft_tokens=4, min_budget=6, pool_tokens=1024))


@pytest.fixture(scope="module")
def batch():
    input_ids, mask = left_padded(2, 9, 5)
    return {"input_ids": input_ids, "attention_mask": mask}


class TestAsHuggingFace:
    def test_stop_tokens_and_padding(self, model, fast, batch):
        plain = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        stops = [int(plain[0, -30]), int(plain[1, -20])]
        for eos, pad in [(stops, 7), (stops[0], 0), (stops[1], None)]:
            config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, max_new_tokens=NEW, do_sample=False)
            expected = model.generate(**batch, generation_config=config)
            assert torch.equal(fast.generate(**batch, generation_config=config), expected)

    def test_output_is_as_wide_as_the_longest_text(self, model, fast, batch):
        plain = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        stops = plain[:, -30:-25].flatten().tolist()  # every text meets one of these
        expected = model.generate(**batch, max_new_tokens=NEW, eos_token_id=stops, pad_token_id=3)
        assert expected.shape[1] < plain.shape[1]
        assert torch.equal(fast.generate(**batch, max_new_tokens=NEW, eos_token_id=stops, pad_token_id=3), expected)

    def test_lengths(self, model, fast, batch):
        for arguments in ({}, {"max_length": 33}, {"max_new_tokens": 1}, {"max_new_tokens": 3, "max_length": 99}):
            expected = model.generate(**batch, **arguments, do_sample=False)
            assert torch.equal(fast.generate(**batch, **arguments, do_sample=False), expected)

    def test_the_models_own_generation_config_counts(self, model, fast, batch, monkeypatch):
        monkeypatch.setattr(model.generation_config, "max_new_tokens", 11)
        monkeypatch.setattr(model.generation_config, "eos_token_id", 5)
        assert torch.equal(fast.generate(**batch), model.generate(**batch, do_sample=False))

    def test_other_ways_to_give_prompts(self, model, fast, batch, monkeypatch):
        expected = fast.generate(**batch, max_new_tokens=5)
        mask = batch["attention_mask"]
        assert torch.equal(fast.generate(inputs=batch["input_ids"], attention_mask=mask, max_new_tokens=5), expected)
        assert torch.equal(fast.generate(batch["input_ids"].int(), mask, max_new_tokens=5), expected)
        monkeypatch.setattr(model.generation_config, "bos_token_id", 7)
        assert torch.equal(fast.generate(max_new_tokens=5), model.generate(max_new_tokens=5, do_sample=False))

    def test_prompts_without_a_mask(self, model, fast):
        input_ids = left_padded(9, 9)[0]
        expected = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=NEW)
        assert torch.equal(fast.generate(input_ids, max_new_tokens=NEW), expected)

    def test_padding_without_a_mask_is_found_as_huggingface_finds_it(self, model, fast, batch):
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(batch["input_ids"], **settings)
        assert torch.equal(expected, model.generate(**batch, **settings))
        assert torch.equal(fast.generate(batch["input_ids"], **settings), expected)
        settings["eos_token_id"] = 0  # now it is an ordinary token
        expected = model.generate(batch["input_ids"], **settings)
        assert torch.equal(fast.generate(batch["input_ids"], **settings), expected)

    def test_none_switches_a_configs_setting_off(self, model, fast, batch, monkeypatch):
        stop = int(model.generate(**batch, max_new_tokens=NEW, do_sample=False)[1, -20])
        monkeypatch.setattr(model.generation_config, "eos_token_id", stop)
        expected = model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert torch.equal(fast.generate(**batch, max_new_tokens=NEW, eos_token_id=None), expected)
        assert not torch.equal(fast.generate(**batch, max_new_tokens=NEW), expected)

    def test_inside_and_outside_of_inference_mode(self, model, batch):
        fast = ss.optimize(model, ss.SpecConfig(draft_tokens=2, min_budget=6))
        with torch.inference_mode():
            inside = fast.generate(**batch, max_new_tokens=NEW)
        assert torch.equal(fast.generate(**batch, max_new_tokens=NEW), inside)

    def test_a_stopped_text_is_an_error(self, fast, batch):
        class Stopping:
            def put(self, tokens):
                if tokens.ndim < 2:  # not the prompt
                    fast.stop()

            def end(self):
                pass

        with pytest.raises(StoppedError, match="1 of 1 texts before they were whole"):
            fast.generate(batch["input_ids"][1:2], max_new_tokens=NEW, streamer=Stopping())

    def test_streamer_hears_every_token_in_order(self, fast, batch):
        heard = []

        class Streamer:
            def put(self, value):
                heard.append(value.flatten().tolist())

            def end(self):
                heard.append("end")

        input_ids = batch["input_ids"][1:2]
        output = fast.generate(input_ids, max_new_tokens=NEW, streamer=Streamer())
        assert heard[-1] == "end"
        assert [token for piece in heard[:-1] for token in piece] == output[0].tolist()
        with pytest.raises(SamplingError, match="one prompt, got 3"):
            fast.generate(**batch, max_new_tokens=3, streamer=Streamer())
        with pytest.raises(SamplingError, match=r"streamer must have put\(tokens\) and end\(\).*got object"):
            fast.generate(input_ids, max_new_tokens=3, streamer=object())


class TestSampling:
    ARGUMENTS = ({"temperature": 0.8, "top_k": 0}, {"temperature": 0.8, "top_k": 12, "top_p": 0.9})

    @pytest.fixture(scope="class")
    def plain(self, model):
        return ss.optimize(model, ss.SpecConfig(draft_tokens=0))

    @pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
    def test_text_is_plain_samplings_for_20_seeds_alone_and_in_company(self, fast, plain, batch, arguments):
        seeds = [10**17 + seed for seed in range(20)]
        prompt, mask = batch["input_ids"][1:2], batch["attention_mask"][1:2]
        settings = {"max_new_tokens": NEW, "do_sample": True, **arguments}
        together, expected = (
            one.generate(prompt.expand(20, -1), mask.expand(20, -1), seed=seeds, **settings) for one in (fast, plain)
        )
        assert len({tuple(row) for row in together.tolist()}) == 20
        assert torch.equal(together, expected)
        for number in (0, 7, 19):
            for one in (fast, plain):
                alone = one.generate(prompt, mask, seed=[seeds[number]], **settings)
                assert torch.equal(together[number], alone[0])

    def test_one_seed_for_a_batch_gives_each_request_its_own(self, fast, plain, batch):
        same_prompt = batch["input_ids"][1:2].expand(6, -1)
        text = fast.generate(same_prompt, max_new_tokens=NEW, do_sample=True, top_k=0, seed=3)
        assert len({tuple(row) for row in text.tolist()}) == 6
        assert torch.equal(text, plain.generate(same_prompt, max_new_tokens=NEW, do_sample=True, top_k=0, seed=3))
        assert not torch.equal(text, fast.generate(same_prompt, max_new_tokens=NEW, do_sample=True, top_k=0, seed=4))

    def test_without_a_seed_torchs_generator_decides(self, fast, batch):
        torch.manual_seed(5)
        first = fast.generate(**batch, max_new_tokens=NEW, do_sample=True)
        second = fast.generate(**batch, max_new_tokens=NEW, do_sample=True)
        torch.manual_seed(5)
        assert torch.equal(fast.generate(**batch, max_new_tokens=NEW, do_sample=True), first)
        assert not torch.equal(first, second)

    def test_settings_of_each_request(self, fast, batch):
        """A batch with different settings gives each request the text it gets alone with them."""
        temperatures, top_ks = np.array([0.5, 1.0, 2.0]), torch.tensor([0, 5, 40])
        together = fast.generate(
            **batch, max_new_tokens=NEW, do_sample=True, temperature=temperatures, top_k=top_ks, seed=[7, 8, 9]
        )
        for i in range(3):
            alone = fast.generate(
                batch["input_ids"][i : i + 1],
                batch["attention_mask"][i : i + 1],
                max_new_tokens=NEW,
                do_sample=True,
                temperature=float(temperatures[i]),
                top_k=int(top_ks[i]),
                seed=np.array([7 + i]),
            )
            assert torch.equal(together[i], alone[0])

    def test_top_k_is_huggingfaces_50_unless_given(self, fast, batch):
        settings = {"max_new_tokens": NEW, "do_sample": True, "temperature": 5.0, "seed": 1}
        default = fast.generate(**batch, **settings)
        assert torch.equal(default, fast.generate(**batch, **settings, top_k=50))
        assert not torch.equal(default, fast.generate(**batch, **settings, top_k=0))


IDS = torch.tensor([[3, 4, 5]])


class TestStopStrings:
    @pytest.fixture(scope="class")
    def tokenizer(self):
        return letters()

    @pytest.mark.parametrize("place", [0, 1, 6, 7])
    def test_texts_end_where_huggingfaces_end(self, model, fast, batch, tokenizer, place):
        """At the first token, where the string begins in the prompt; within tokens; across them.

        HuggingFace pads behind a text only where there is a stop token, too.
        """
        texts = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        width = batch["input_ids"].shape[1]
        string = tokenizer.decode(texts[2, width - 1 :])[2 * place + 1 : 2 * place + 3 + place % 2]
        settings = {"max_new_tokens": NEW, "stop_strings": ["never there", string], "tokenizer": tokenizer}
        settings |= {"eos_token_id": min(set(range(VOCABULARY)) - set(texts.flatten().tolist())), "pad_token_id": 0}
        expected = model.generate(**batch, **settings, do_sample=False)
        assert expected[2, width + place :].ne(0).sum() == 1
        assert torch.equal(fast.generate(**batch, **settings), expected)


class TestNumReturnSequences:
    def test_each_is_the_text_of_its_seed(self, fast, batch):
        settings = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.8}
        together = fast.generate(**batch, **settings, num_return_sequences=2, seed=[1, 2, 3, 4, 5, 6])
        rows = {name: value.repeat_interleave(2, dim=0) for name, value in batch.items()}
        assert torch.equal(together, fast.generate(**rows, **settings, seed=[1, 2, 3, 4, 5, 6]))
        assert len({tuple(row) for row in together.tolist()}) == 6


class TestRefusals:
    """The whole list is in `tests/requests/`."""

    def test_whatever_was_refused_the_model_works_on(self, model, fast, batch):
        expected = model.generate(**batch, max_new_tokens=5, do_sample=False)
        for error, arguments in [
            (PromptError, {"input_ids": IDS[0]}),
            (PromptError, {**batch, "inputs": IDS}),
            (SamplingError, {**batch, "num_beams": 4}),
            (SamplingError, {**batch, "max_new_tokens": 0}),
        ]:
            with pytest.raises(error):
                fast.generate(**{"max_new_tokens": 5, **arguments})
            assert torch.equal(fast.generate(**batch, max_new_tokens=5), expected)

    def test_the_models_own_settings_are_refused_in_batches_as_in_generate(self, fast, monkeypatch):
        monkeypatch.setattr(fast.generation_config, "guidance_scale", 1.05)
        with pytest.raises(SamplingError, match=r"guidance_scale=1.05"):
            fast.generate(IDS)
        for call in (fast.generate_batch, fast.stream, lambda *given: list(fast.as_completed(*given))):
            for sampling in (None, ss.SamplingParams(max_new_tokens=3)):
                with pytest.raises(SamplingError, match=r"model.generation_config.guidance_scale=1.05"):
                    call([[3, 4]], sampling)

    def test_pool_too_small_for_a_request(self, fast):
        with pytest.raises(PoolTooSmallError, match=r"1022 tokens.* needs 64 pages .* holds 63"):
            ss.optimize(fast.model, ss.SpecConfig(pool_tokens=1008)).generate(IDS, max_new_tokens=1019)

    def test_config_of_a_wrong_type(self, model):
        with pytest.raises(ConfigError, match="got dict"):
            ss.optimize(model, {"draft_tokens": 4})

    @pytest.mark.parametrize("given", ["Qwen/Qwen3-8B", None, torch.nn.Linear(2, 2)])
    def test_what_is_no_transformers_model(self, given):
        with pytest.raises(UnsupportedModelError, match=f"got {type(given).__name__}.*from_pretrained"):
            ss.optimize(given)

    def test_what_wraps_a_model_is_told_what_to_unwrap(self, model, fast):
        class Adapters(torch.nn.Module):
            def merge_and_unload(self):
                return model

        parallel = torch.nn.DataParallel(model)
        for given, way in [
            (torch.compile(model), r"OptimizedModule.*pass its \._orig_mod"),
            (parallel, r"DataParallel.*pass its \.module"),
            (fast, r"OptimizedModel.*pass its \.model"),
            (Adapters(), r"Adapters.*pass model\.merge_and_unload\(\)"),
        ]:
            with pytest.raises(UnsupportedModelError, match=way):
                ss.optimize(given)

    def test_model_on_no_device(self):
        with pytest.raises(UnsupportedModelError, match="meta"):
            ss.optimize(tiny("llama").to("meta"))


class TestPositions:
    def test_rotary_ones_go_on_with_a_warning_as_in_huggingface(self):
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
        model = tiny("llama", num_hidden_layers=1, max_position_embeddings=32, rope_parameters=rope)
        fast = ss.optimize(model, ss.SpecConfig(draft_tokens=3, min_budget=6))
        expected = model.generate(IDS, max_new_tokens=50, do_sample=False)
        with pytest.warns(ContextLengthWarning, match="may need 53 positions, the model is made for 32"):
            assert torch.equal(fast.generate(IDS, max_new_tokens=50), expected)
        assert torch.equal(fast.generate(IDS), model.generate(IDS, do_sample=False))

    def test_learned_ones_end(self):
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=None)
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        fast = ss.optimize(model)
        expected = model.generate(IDS, max_new_tokens=29, do_sample=False)
        assert torch.equal(fast.generate(IDS, max_new_tokens=29), expected)
        for call in (lambda: fast.generate(IDS, max_new_tokens=30), lambda: fast.capture(1, 33)):
            with pytest.raises(ContextLengthError, match="need 33 positions, the model has 32"):
                call()


def test_weights_changed_in_place_take_effect():
    model = tiny("qwen3", num_hidden_layers=1)
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=3, min_budget=6))
    input_ids, mask = left_padded(4, 11)
    before = fast.generate(input_ids, mask, max_new_tokens=20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1).add_(0.01 * torch.randn_like(parameter))
    after = fast.generate(input_ids, mask, max_new_tokens=20)
    assert not torch.equal(before, after)
    assert torch.equal(after, model.generate(input_ids, attention_mask=mask, max_new_tokens=20, do_sample=False))


def test_a_compiled_model_cannot_be_copied(fast):
    with pytest.raises(CopyError, match="call optimize on the copy"):
        copy.deepcopy(fast)


def test_stats_count_nothing_behind_the_end(model):
    """A text of 3 tokens needs two verified positions, however many the last verification went on."""
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=8, drafter="full"))
    prompt = left_padded(9)[0]
    text = fast.generate(prompt, max_new_tokens=40)
    whole = fast.stats
    fast.generate(prompt, max_new_tokens=40, eos_token_id=int(text[0, 11]))
    assert (fast.stats.tokens, fast.stats.cycles, fast.stats.by_cycle) == (3, 0, {})
    assert 0 < fast.stats.kv_read_plain < whole.kv_read_plain / 10


def test_replaced_parameters_are_noticed():
    model = tiny("qwen3", num_hidden_layers=1)
    fast = ss.optimize(model)
    model.to(torch.bfloat16)
    with pytest.raises(StaleParametersError):
        fast.generate(IDS, max_new_tokens=3)


@pytest.fixture
def half_by_default():
    """Many load models with `torch.set_default_dtype(torch.bfloat16)` and leave it so."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_default_dtype_does_not_matter(model, half_by_default):
    params = ss.SamplingParams(max_new_tokens=20, temperature=0.8, seed=3, logprobs=True)
    prompts = [list(range(2, 40)), [5, 6]]
    settings = ss.SpecConfig(draft_tokens=3, min_budget=6)
    halved = ss.optimize(model, settings).generate_batch(prompts, params)
    torch.set_default_dtype(torch.float32)
    for got, expected in zip(halved, ss.optimize(model, settings).generate_batch(prompts, params), strict=True):
        assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)


@pytest.mark.slow
def test_inductor_gives_the_same_text(model, batch):
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=3, min_budget=6, backend="inductor"))
    for arguments in ({}, {"do_sample": True, "seed": 2}):
        text = fast.generate(**batch, max_new_tokens=NEW, **arguments)
        eager = ss.optimize(model, ss.SpecConfig(draft_tokens=0)).generate(**batch, max_new_tokens=NEW, **arguments)
        assert torch.equal(text, eager)
