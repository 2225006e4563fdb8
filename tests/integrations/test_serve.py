"""transformers' own server with this engine in it, driven by the `openai` client."""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import sparsespec_compile as ss

from ..support.models import tiny
from ..support.tokenizer import letters

pytestmark = pytest.mark.slow
pytest.importorskip("fastapi", reason="needs '.[serve]'")
pytest.importorskip("uvicorn", reason="needs '.[serve]'")
openai = pytest.importorskip("openai", reason="needs '.[serve]'")

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
QUESTIONS = ["abcdef", "bababcabab", "cdcdcdeaeb", "adaeaf"]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", num_hidden_layers=1).save_pretrained(folder)
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def text_of(question, **settings):
    """transformers' own, greedy."""
    ids = torch.tensor([letters()(question).input_ids])
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0, **settings}
    tokens = tiny("llama", num_hidden_layers=1).generate(ids, **settings)[0, ids.shape[1] :]
    return letters().decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module")
def expected():
    return {question: text_of(question) for question in QUESTIONS}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(folder):
    from sparsespec_compile.integrations.serve import serve

    port = free_port()
    config = ss.SpecConfig(draft_tokens=3, min_budget=8)
    server = serve(folder, config, host="127.0.0.1", port=port, device="cpu", dtype="float32", non_blocking=True)
    server.url = f"http://127.0.0.1:{port}/v1"
    until = time.monotonic() + 60
    while not server.server.started:
        assert time.monotonic() < until
        time.sleep(0.05)
    yield server
    server.kill_server()


@pytest.fixture
def ask(server, folder):
    client = openai.OpenAI(base_url=server.url, api_key="none", timeout=120, max_retries=0)

    def ask(question, **settings):
        settings = {"temperature": 0.0, "max_tokens": NEW_TOKENS, **settings}
        messages = [{"role": "user", "content": question}]
        return client.chat.completions.create(model=folder, messages=messages, **settings)

    return ask


def test_the_command(folder, expected):
    port = free_port()
    command = [sys.executable, "-m", "sparsespec_compile", "serve", folder, "--port", str(port), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--spec-config", '{"draft_tokens": 3}']
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
    process = subprocess.Popen(command)
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert time.monotonic() < until
                time.sleep(0.2)
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        settings = {"temperature": 0.0, "max_tokens": NEW_TOKENS}
        answer = client.chat.completions.create(model=folder, messages=messages, **settings)
        assert answer.choices[0].message.content == expected[QUESTIONS[0]]
    finally:
        process.terminate()
        process.wait(60)


def manager_of(server):
    return server._generation_state._cb_manager._cb


def test_chat_completions(server, ask, expected):
    for question in QUESTIONS:
        answer = ask(question)
        assert answer.choices[0].message.content == expected[question]
        assert answer.usage.completion_tokens == NEW_TOKENS
    assert type(manager_of(server)).__module__ == "sparsespec_compile.integrations.manager"


def test_streaming(ask, expected):
    for question in QUESTIONS:
        pieces = [chunk.choices[0].delta.content or "" for chunk in ask(question, stream=True) if chunk.choices]
        assert len([piece for piece in pieces if piece]) > 3
        assert "".join(pieces) == expected[question]


def test_twenty_at_a_time(ask, expected):
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, QUESTIONS * 5))
    assert [answer.choices[0].message.content for answer in answers] == [expected[one] for one in QUESTIONS * 5]


def test_a_client_that_leaves_ends_its_request(server, ask, expected):
    stream = ask(QUESTIONS[0], stream=True, max_tokens=900)
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 60
    while manager_of(server)._named:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert ask(QUESTIONS[1]).choices[0].message.content == expected[QUESTIONS[1]]


def test_each_request_has_its_own_sampling(server, ask, expected):
    model = server._model_manager.loaded_models
    (held,) = model.values()
    held.model.generation_config.do_sample = True
    try:
        texts = {ask(QUESTIONS[0], temperature=1.0).choices[0].message.content for _ in range(4)}
        assert len(texts) > 1
        assert ask(QUESTIONS[0]).choices[0].message.content == expected[QUESTIONS[0]]
    finally:
        held.model.generation_config.do_sample = False


def test_what_cannot_be_had_is_the_clients_to_know(ask):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(QUESTIONS[0], extra_body={"generation_config": '{"guidance_scale": 1.5, "max_new_tokens": 5}'})
    assert "SamplingError: generation_config.guidance_scale=1.5 is not supported" in caught.value.response.text


def test_a_clients_bias_and_penalty_are_applied(ask, expected):
    """transformers' server makes a sequence bias and a repetition penalty of them."""
    first = letters()(expected[QUESTIONS[0]]).input_ids[0]
    for asked, settings in [
        ({"logit_bias": {str(first): -100}}, {"sequence_bias": {(first,): -100.0}}),
        ({"frequency_penalty": 1.0}, {"repetition_penalty": 2.0}),
    ]:
        found = ask(QUESTIONS[0], **asked).choices[0].message.content
        assert found == text_of(QUESTIONS[0], **settings)
        assert found != expected[QUESTIONS[0]]
