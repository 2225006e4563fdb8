"""An equipped model's `generate_batch`, against transformers' own on the same model."""

import copy
import io

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

import sparsespec_compile as ss
from sparsespec_compile.errors import (
    ConfigError,
    ContextLengthError,
    PromptError,
    SamplingError,
    StaleParametersError,
    UnsupportedModelError,
)
from sparsespec_compile.integrations.transformers import finished
from sparsespec_compile.runtime.host.request import RequestStats

from ..support.models import tiny

CONFIG = ss.SpecConfig(draft_tokens=3, min_budget=8)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [3] * 20, [5, 6, 7]]
ROOM = {"num_blocks": 64, "max_batch_tokens": 64}  # transformers' own engine must be told on a CPU


def greedy(**settings):
    return GenerationConfig(do_sample=False, **{"max_new_tokens": 12, **settings})


def sampled(**settings):
    return GenerationConfig(do_sample=True, **{"max_new_tokens": 12, **settings})


def tokens(outputs):
    return [output.generated_tokens for output in outputs.values()]


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3", num_hidden_layers=1)


@pytest.fixture(scope="module")
def theirs(model):
    """What transformers' own gives for greedy texts that may end at token 133 or 44, with log-probabilities."""
    batching = ContinuousBatchingConfig(return_logprobs=True, **ROOM)
    return copy.deepcopy(model).generate_batch(
        PROMPTS, generation_config=greedy(eos_token_id=[133, 44]), continuous_batching_config=batching
    )


@pytest.fixture(scope="module")
def equipped(model):
    equipped = copy.deepcopy(model)
    ss.install(equipped, CONFIG, release=False)
    return equipped


class TestResults:
    def test_are_those_of_transformers(self, equipped, theirs):
        ours = equipped.generate_batch(
            PROMPTS,
            generation_config=greedy(eos_token_id=[133, 44]),
            continuous_batching_config=ContinuousBatchingConfig(return_logprobs=True),
            progress_bar=False,
        )
        assert list(ours) == list(theirs) == ["req_0", "req_1", "req_2", "req_3"]
        for name, output in ours.items():
            assert isinstance(output, GenerationOutput)
            assert output.request_id == name
            assert output.prompt_ids == theirs[name].prompt_ids
            assert output.generated_tokens == theirs[name].generated_tokens
            assert output.logprobs == pytest.approx(theirs[name].logprobs, abs=1e-4)
            assert (output.status, output.error) == (RequestStatus.FINISHED, None)
            assert output.is_finished()
            assert output.created_time <= output.lifespan[0] < output.lifespan[1]
            assert output.timestamps is None
        assert ours["req_0"].generated_tokens[-1] == 133  # the token that ended the text is kept
        assert len(ours["req_2"].generated_tokens) == 12

    def test_no_prompts_no_results(self, equipped):
        assert equipped.generate_batch([]) == {}

    def test_timestamps_when_asked(self, equipped):
        outputs = equipped.generate_batch(PROMPTS, generation_config=greedy(), record_timestamps=True)
        for output in outputs.values():
            assert len(output.timestamps) == 12
            assert output.timestamps == sorted(output.timestamps)
            assert output.lifespan[0] < output.timestamps[0]

    def test_max_new_tokens_of_the_call_comes_first(self, equipped):
        outputs = equipped.generate_batch(PROMPTS, generation_config=greedy(), max_new_tokens=3)
        assert [len(text) for text in tokens(outputs)] == [3] * 4

    def test_several_texts_of_a_prompt_are_named_as_transformers_names_them(self, equipped):
        outputs = equipped.generate_batch(PROMPTS[:2], generation_config=sampled(num_return_sequences=3))
        own = ["req_0__child#0", "req_0__child#1", "req_0", "req_1__child#0", "req_1__child#1", "req_1"]
        assert list(outputs) == [output.request_id for output in outputs.values()] == own
        assert [output.prompt_ids for output in outputs.values()] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
        assert len({tuple(text) for text in tokens(outputs)}) == 6

    @pytest.mark.parametrize(
        ("reason", "error", "says"),
        [
            (ss.FinishReason.MEMORY, None, "nor host memory could hold"),
            (ss.FinishReason.ERROR, ValueError("no"), "ValueError: no"),
        ],
    )
    def test_a_failed_text_says_so(self, reason, error, says):
        output = finished(ss.Completion(0, 0, [4], reason, [], RequestStats(), error), 0.0, None)
        assert output.status is RequestStatus.FAILED
        assert says in output.error
        assert output.generated_tokens == [4]


class TestSampling:
    def test_a_seed_reproduces_texts_that_differ(self, equipped):
        batching = ContinuousBatchingConfig()
        if not hasattr(batching, "seed"):
            pytest.skip("this transformers has no seed for continuous batching")
        batching.seed = 7
        first, again = (
            tokens(equipped.generate_batch(PROMPTS, generation_config=sampled(), continuous_batching_config=batching))
            for _ in range(2)
        )
        assert first == again
        assert first[0] != first[3]  # equal prompts
        batching.seed = 8
        assert first != tokens(
            equipped.generate_batch(PROMPTS, generation_config=sampled(), continuous_batching_config=batching)
        )

    def test_torchs_generator_seeds_the_rest(self, equipped):
        texts = []
        for _ in range(2):
            torch.manual_seed(3)
            texts.append(tokens(equipped.generate_batch(PROMPTS, generation_config=sampled())))
        assert texts[0] == texts[1]
        assert texts[0] != tokens(equipped.generate_batch(PROMPTS, generation_config=sampled()))

    def test_a_filter_that_is_not_named_is_off(self, equipped, monkeypatch):
        """Where `generate` would keep 50 tokens; and the model's own settings do not show through."""
        monkeypatch.setattr(equipped, "generation_config", sampled(temperature=0.1, top_k=1))
        settings, _ = equipped.generate_batch.__self__.read(sampled(), None)
        assert settings.draw == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        settings, _ = equipped.generate_batch.__self__.read(None, None)
        assert settings.draw == {"temperature": 0.1, "top_k": 1, "top_p": 1.0, "min_p": 0.0}

    def test_what_the_models_own_settings_ask_for_does_not_count(self, equipped, monkeypatch):
        expected = tokens(equipped.generate_batch(PROMPTS, generation_config=greedy()))
        monkeypatch.setattr(equipped, "generation_config", GenerationConfig(repetition_penalty=1.5, eos_token_id=133))
        assert tokens(equipped.generate_batch(PROMPTS, generation_config=greedy())) == expected
        settings, _ = equipped.generate_batch.__self__.read(None, None)
        assert settings.sampling(0, 24).repetition_penalty == 1.5
        assert tokens(equipped.generate_batch(PROMPTS, generation_config=greedy(repetition_penalty=1.5))) != expected

    def test_one_token_is_left(self, equipped):
        texts = tokens(equipped.generate_batch(PROMPTS, generation_config=sampled(top_k=1)))
        assert texts == tokens(equipped.generate_batch(PROMPTS, generation_config=greedy()))

    def test_texts_without_a_length_end_with_the_positions(self, equipped):
        settings, _ = equipped.generate_batch.__self__.read(GenerationConfig(), None)
        assert settings.sampling(0, 24).max_new_tokens == 1000
        settings, _ = equipped.generate_batch.__self__.read(GenerationConfig(max_length=30), None)
        assert settings.sampling(0, 24).max_new_tokens == 6
        with pytest.raises(ContextLengthError, match="fills the 30"):
            settings.sampling(0, 30)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "name"),
        [
            ({"repetition_penalty": -1.1}, "repetition_penalty must be a number above 0"),
            ({"guidance_scale": 1.1}, r"generation_config\.guidance_scale=1\.1"),
            ({"num_beams": 2}, "num_beams=2"),
            ({"stop_strings": ["ab"]}, r"stop_strings=\['ab'\] needs a tokenizer"),
            ({"max_new_tokens": 0}, "max_new_tokens must be"),
            ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0"),
        ],
        ids=str,
    )
    def test_of_generation_settings(self, equipped, settings, name):
        asked = greedy()
        for field, value in settings.items():  # not in the constructor, which has checks of its own
            setattr(asked, field, value)
        with pytest.raises(SamplingError, match=name):
            equipped.generate_batch(PROMPTS, generation_config=asked)

    @pytest.mark.parametrize("prompt", ["text", [{"role": "user", "content": "text"}], [1.5], torch.tensor([1.5])])
    def test_of_what_is_no_token_ids(self, equipped, prompt):
        """There is no tokenizer to be passed here, and the errors do not ask for one."""
        with pytest.raises(PromptError, match=r"Prompt 1 must be .*Allowed: a sequence of token ids alone") as refused:
            equipped.generate_batch([PROMPTS[0], prompt], generation_config=greedy())
        assert "tokenizer=" not in str(refused.value)

    def test_of_unknown_arguments(self, equipped):
        with pytest.raises(SamplingError, match=r"unknown argument.* temperature"):
            equipped.generate_batch(PROMPTS, temperature=0.5)
        with pytest.raises(SamplingError, match="must be a GenerationConfig, got dict"):
            equipped.generate_batch(PROMPTS, {"max_new_tokens": 3})
        with pytest.raises(ConfigError, match="must be a ContinuousBatchingConfig"):
            equipped.generate_batch(PROMPTS, continuous_batching_config={"return_logprobs": True})

    def test_of_log_probabilities_of_another_distribution(self, equipped):
        batching = ContinuousBatchingConfig(return_logprobs=True)
        with pytest.raises(SamplingError, match=r"return_logprobs=True with .*'temperature': 0\.5"):
            equipped.generate_batch(
                PROMPTS, generation_config=sampled(temperature=0.5), continuous_batching_config=batching
            )
        outputs = equipped.generate_batch(PROMPTS, generation_config=sampled(), continuous_batching_config=batching)
        assert all(len(output.logprobs) == 12 for output in outputs.values())

    def test_of_a_field_that_this_version_does_not_know(self, equipped, monkeypatch):
        from sparsespec_compile.requests import continuous_batching

        monkeypatch.setattr(continuous_batching, "_NO_EFFECT", continuous_batching._NO_EFFECT - {"scheduler_type"})
        batching = ContinuousBatchingConfig(scheduler_type="prefill_first")
        with pytest.raises(ConfigError, match="scheduler_type='prefill_first', which this version does not know"):
            equipped.generate_batch(PROMPTS, continuous_batching_config=batching)

    def test_every_field_of_this_transformers_is_known(self):
        from sparsespec_compile.requests import continuous_batching as reading

        known = reading._APPLIED | reading._LIMITS.keys() | reading._NO_EFFECT
        assert reading.batching_fields() <= known

    def test_what_lighteval_sets_on_the_generation_config_has_no_effect(self, equipped):
        asked = greedy()
        asked.use_cuda_graph, asked.max_batch_tokens, asked.output_scores = False, 256, True
        assert len(equipped.generate_batch(PROMPTS, generation_config=asked)) == 4


class TestLimits:
    def test_the_first_call_bounds_the_engine(self, model):
        equipped = copy.deepcopy(model)
        installation = ss.install(equipped, CONFIG)
        batching = ContinuousBatchingConfig(max_memory_percent=0.5)
        equipped.generate_batch(PROMPTS[:1], greedy(), batching)
        assert installation.fast.spec_config.memory_fraction == 0.5
        equipped.generate_batch(PROMPTS[:1], greedy())
        batching.max_memory_percent = 0.25
        with pytest.raises(ConfigError, match=r"max_memory_percent=0\.25 .*compiled with .*memory_fraction=0\.5"):
            equipped.generate_batch(PROMPTS[:1], greedy(), batching)

    def test_what_nobody_has_set_bounds_nothing(self, equipped):
        _, limits = equipped.generate_batch.__self__.read(greedy(), ContinuousBatchingConfig())
        assert not limits.settings


class TestInstallation:
    def test_uninstalling_restores_the_model(self, model):
        equipped = copy.deepcopy(model)
        before = dict(vars(equipped))
        assert "generate_batch" not in before
        ss.install(equipped, CONFIG)
        texts = tokens(equipped.generate_batch(PROMPTS, generation_config=greedy()))
        ss.uninstall(equipped)
        assert vars(equipped).keys() == before.keys()
        ss.uninstall(equipped)
        own = equipped.generate_batch(
            PROMPTS, generation_config=greedy(), continuous_batching_config=ContinuousBatchingConfig(**ROOM)
        )
        assert tokens(own) == texts

    def test_a_copy_is_equipped_for_itself(self, equipped):
        texts = tokens(equipped.generate_batch(PROMPTS, generation_config=greedy()))
        file = io.BytesIO()
        torch.save(equipped, file)
        file.seek(0)
        for other in (copy.deepcopy(equipped), torch.load(file, weights_only=False)):
            own = other.generate_batch.__self__
            assert own.model is other
            assert own.config == CONFIG
            with torch.no_grad():
                other.lm_head.weight.mul_(-1)
            assert tokens(other.generate_batch(PROMPTS, generation_config=greedy())) != texts
        assert tokens(equipped.generate_batch(PROMPTS, generation_config=greedy())) == texts

    def test_memory_is_given_back_unless_it_is_to_be_kept(self, model):
        equipped = copy.deepcopy(model)
        installation = ss.install(equipped, CONFIG)
        equipped.generate_batch(PROMPTS, generation_config=greedy())
        assert installation.fast.memory_plan is None
        equipped.generate_batch(PROMPTS, generation_config=greedy(), persistent_manager=True)
        assert installation.fast.memory_plan is not None
        installation.release()
        assert installation.fast.memory_plan is None

    def test_weights_take_effect_at_once(self, model):
        equipped = copy.deepcopy(model)
        ss.install(equipped, CONFIG)
        before = tokens(equipped.generate_batch(PROMPTS, generation_config=greedy()))
        equipped.train()
        equipped.gradient_checkpointing_enable()
        optimizer = torch.optim.SGD(equipped.parameters(), lr=0.5)
        ids = torch.tensor([[5, 6, 7, 1, 2, 3]])
        equipped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        equipped.to(torch.float32)
        after = tokens(equipped.generate_batch(PROMPTS, generation_config=greedy()))
        assert not equipped.training  # as transformers' own leaves it
        assert after != before
        prompt = torch.tensor(PROMPTS[:1])
        equipped.gradient_checkpointing_disable()
        assert after[0] == equipped.generate(prompt, generation_config=greedy(pad_token_id=0))[0, 3:].tolist()

    @pytest.mark.slow
    def test_a_model_that_became_another_is_refused(self, model):
        equipped = copy.deepcopy(model)
        ss.install(equipped, CONFIG)
        equipped.generate_batch(PROMPTS, generation_config=greedy())
        equipped.to(torch.bfloat16)
        with pytest.raises(StaleParametersError, match=r"or call install\(model\) again"):
            equipped.generate_batch(PROMPTS, generation_config=greedy())
        ss.install(equipped, CONFIG)
        assert len(equipped.generate_batch(PROMPTS, generation_config=greedy())) == 4

    @pytest.mark.slow
    def test_autocast_to_the_dtype_of_the_parameters_is_set_aside(self, model):
        """As Accelerate wraps a model that TRL then casts."""
        equipped = copy.deepcopy(model).to(torch.bfloat16)
        ss.install(equipped, CONFIG)
        plain = tokens(equipped.generate_batch(PROMPTS, generation_config=greedy()))
        wrapper = torch.autocast("cpu", torch.bfloat16)(type(equipped).forward)
        equipped.forward = wrapper.__get__(equipped)
        ss.install(equipped, CONFIG)
        for _ in range(2):
            assert tokens(equipped.generate_batch(PROMPTS, generation_config=greedy())) == plain
        assert equipped.forward.__func__ is wrapper

    def test_what_is_no_model_is_refused(self, model):
        with pytest.raises(UnsupportedModelError, match=r"install takes a loaded transformers model.*Linear"):
            ss.install(torch.nn.Linear(2, 2))
        with pytest.raises(ConfigError, match="config must be a SpecConfig"):
            ss.install(model, {"draft_tokens": 3})
        with pytest.raises(ConfigError, match="release must be True or False"):
            ss.install(model, release="always")
