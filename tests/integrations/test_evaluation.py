"""lm-evaluation-harness and lighteval on this engine: the scores are those of the plain model."""

import json

import pytest
import torch

import sparsespec_compile as ss

from ..support.models import tiny
from ..support.tokenizer import letters

pytestmark = pytest.mark.slow
CONFIG = ss.SpecConfig(draft_tokens=3, min_budget=8)
QUESTIONS = ["abcdef", "bababcabab", "cdcdcdeaeb", "adaeaf", "ebecedeeef", "acac"]
NEW_TOKENS = 9


def tokenizer():
    tokenizer = letters()
    tokenizer.eos_token = "ab"
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3", num_hidden_layers=1)


@pytest.fixture(scope="module")
def documents(model):
    """Questions, and what the model itself answers to every second; another text to the others."""
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    found = []
    for nth, question in enumerate(QUESTIONS):
        ids = torch.tensor([tokenizer()(question).input_ids])
        text = tokenizer().decode(model.generate(ids, **settings)[0, ids.shape[1] :])
        found.append({"question": question, "answer": text if nth % 2 else "no"})
    return found


def toy_task(documents, folder, until=(), **generation):
    data = folder / "data.json"
    data.write_text("\n".join(map(json.dumps, documents)))
    return [
        {
            "task": "toy",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": list(until), "max_gen_toks": NEW_TOKENS, **generation},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    ]


class TestLMEval:
    @pytest.fixture
    def lm_eval(self):
        return pytest.importorskip("lm_eval", reason="needs '.[eval]'")

    def evaluate(self, lm_eval, lm, tasks):
        results = lm_eval.simple_evaluate(model=lm, tasks=tasks, bootstrap_iters=0, log_samples=True)
        samples = sorted(results["samples"]["toy"], key=lambda sample: sample["doc_id"])
        return results["results"]["toy"]["exact_match,none"], [sample["filtered_resps"] for sample in samples]

    @pytest.mark.parametrize("until", [(), ("be", "dd")])
    def test_scores_and_texts_are_those_of_the_plain_model(self, lm_eval, model, documents, tmp_path, until):
        from lm_eval.models.huggingface import HFLM

        from sparsespec_compile.integrations.lm_eval import SparseSpecLM

        settings = {"pretrained": model, "tokenizer": tokenizer(), "batch_size": 2}
        tasks = toy_task(documents, tmp_path, until)
        plain = self.evaluate(lm_eval, HFLM(**settings), tasks)
        ours = self.evaluate(lm_eval, SparseSpecLM(spec_config=CONFIG, **settings), tasks)
        assert ours == plain
        if not until:
            assert 0 < ours[0] < 1

    def test_what_a_task_cannot_have_is_refused(self, lm_eval, model, documents, tmp_path):
        from sparsespec_compile.errors import SamplingError
        from sparsespec_compile.integrations.lm_eval import SparseSpecLM

        lm = SparseSpecLM(pretrained=model, tokenizer=tokenizer(), spec_config=CONFIG)
        with pytest.raises(SamplingError, match="guidance_scale"):
            self.evaluate(lm_eval, lm, toy_task(documents, tmp_path, guidance_scale=1.5))

    def test_reasoning_is_cut_off(self, lm_eval, model):
        """Up to its last end token, and stop sequences count behind it alone."""
        from lm_eval.api.instance import Instance

        from sparsespec_compile.integrations.lm_eval import SparseSpecLM

        plain = SparseSpecLM(pretrained=model, tokenizer=tokenizer(), spec_config=CONFIG)
        asked = {"until": [], "max_gen_toks": NEW_TOKENS}
        requests = [Instance("generate_until", {}, (QUESTIONS[0], asked), 0)]
        (whole,) = plain.generate_until(requests)
        ids = tokenizer()(whole).input_ids
        thinking = SparseSpecLM(pretrained=model, tokenizer=tokenizer(), think_end_token=ids[2], spec_config=CONFIG)
        requests[0].arguments = (QUESTIONS[0], {**asked, "until": [tokenizer().decode(ids[:1])]})
        after = len(ids) - ids[::-1].index(ids[2])
        expected = tokenizer().decode(ids[after:]).split(tokenizer().decode(ids[:1]))[0]
        assert thinking.generate_until(requests) == [expected]


TASKS = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

def prompt(line, task_name=None):
    return Doc(task_name=task_name, query=line["question"], choices=[line["answer"]], gold_index=0)

TASKS_TABLE = [
    LightevalTaskConfig(
        name="toy",
        prompt_function=prompt,
        hf_repo={folder!r},
        hf_subset="default",
        hf_avail_splits=["train"],
        evaluation_splits=["train"],
        metrics=[Metrics.exact_match],
        generation_size={new_tokens},
        stop_sequence=[],
    )
]
"""


class TestLighteval:
    """`TransformersModel(continuous_batching=True)`, which calls `generate_batch`, beside transformers' own engine."""

    @pytest.fixture
    def grad(self):
        """lighteval switches gradients off for good."""
        before = torch.is_grad_enabled()
        yield
        torch.set_grad_enabled(before)

    def test_scores_and_texts_are_those_of_the_plain_model(self, model, documents, tmp_path, grad, monkeypatch):
        pytest.importorskip("lighteval", reason="needs '.[eval]'")
        # lighteval 0.13 hashes strings, which the newest xxhash takes encoded alone.
        import xxhash
        from lighteval.logging.evaluation_tracker import EvaluationTracker
        from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig
        from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters
        from lighteval.tasks.registry import Registry

        plain_hash = xxhash.xxh64
        monkeypatch.setattr(
            xxhash, "xxh64", lambda *text: plain_hash(*(t.encode() if isinstance(t, str) else t for t in text))
        )
        # Its catalogue is not needed here; one of its tasks downloads data as soon as it is known.
        for name in ("_load_from_files", "_load_from_subdirs"):
            monkeypatch.setattr(Registry, name, staticmethod(lambda *_: {}))

        folder, data, tasks = tmp_path / "model", tmp_path / "data", tmp_path / "tasks_of_this_test.py"
        data.mkdir()
        (data / "train.jsonl").write_text("\n".join(map(json.dumps, documents)))
        tasks.write_text(TASKS.format(folder=str(data), new_tokens=NEW_TOKENS))
        model.save_pretrained(folder)
        chatting = tokenizer()
        # Without a template lighteval 0.13 reads a field that its documents do not have.
        chatting.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        chatting.save_pretrained(folder)

        def evaluate(equipped):
            config = TransformersModelConfig(
                model_name=str(folder),
                continuous_batching=True,
                dtype="float32",
                device="cpu",
                batch_size=2,
                cache_dir=str(tmp_path / f"cache-{equipped}"),  # of answers, too
            )
            lm = TransformersModel(config)
            lm.model.generation_config.max_new_tokens = NEW_TOKENS
            lm.model.generation_config.do_sample = False
            installation = ss.install(lm.model, CONFIG) if equipped else None
            tracker = EvaluationTracker(output_dir=str(tmp_path / f"results-{equipped}"))
            parameters = PipelineParameters(
                launcher_type=ParallelismManager.NONE, custom_tasks_directory=str(tasks), max_samples=None
            )
            pipeline = Pipeline("toy|0", parameters, tracker, model=lm)
            pipeline.evaluate()
            assert installation is None or installation.fast.stats.tokens > NEW_TOKENS
            details = next(iter(tracker.details_logger.details.values()))
            return pipeline.get_results()["results"], [one.model_response.text for one in details]

        plain, ours = evaluate(False), evaluate(True)
        assert ours == plain
        assert 0 < next(iter(ours[0].values()))["em"] < 1
