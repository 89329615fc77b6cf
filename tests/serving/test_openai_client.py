"""The official client of OpenAI's against a server in a process of its own, on a tiny model."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from mlx_hiermem import MemoryLM, load
from tests.serving.processes import LONG, Served
from tests.tiny import make_tiny_model

GOLD = [{"role": "user", "content": "gold is"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("client") / "tiny")


@pytest.fixture(scope="module")
def served(model, tmp_path_factory) -> Iterator[Served]:
    with Served(model, tmp_path_factory.mktemp("control"), "--max-tokens", "200") as served:
        yield served


@pytest.fixture(scope="module")
def lm(model) -> MemoryLM:
    return load(model)


@pytest.fixture(scope="module")
def client(served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.v1, api_key="none", max_retries=0, timeout=LONG) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any = "gold is", **options: Any) -> Any:
    """A completion, greedy and short unless told otherwise."""
    given = {"max_tokens": 8, "temperature": 0, **options}
    return client.completions.create(model="tiny", prompt=prompt, **given)


def chat(client: openai.OpenAI, **options: Any) -> Any:
    """A chat completion, greedy and short unless told otherwise."""
    given = {"max_completion_tokens": 8, "temperature": 0, "messages": GOLD, **options}
    return client.chat.completions.create(model="tiny", **given)


def with_memory(memory: Any) -> dict[str, Any]:
    """The option that sends the ``memory`` field."""
    return {"extra_body": {"memory": memory}}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_answers_are_those_of_the_engine(client, lm):
    for memory in ("fetched", "generic", "none"):
        expected = lm.generate("gold is", memory, 8)
        answer = complete(client, **with_memory(memory))
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "length"
        assert answer.memory["kind"] == memory
        # Its tokenizer has no chat template, so a chat is its newest question.
        messages = [{"role": "user", "content": "silver"}, *GOLD]
        said = chat(client, messages=messages, **with_memory(memory)).choices[0].message
        assert (said.role, said.content) == ("assistant", expected)


def test_usage(client):
    usage = complete(client).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 8, 15)


def test_several_prompts_and_tokens(client, lm):
    answer = complete(client, ["gold is", "silver is"])
    assert [one.index for one in answer.choices] == [0, 1]
    alone = [complete(client, text).choices[0].text for text in ("gold is", "silver is")]
    assert [one.text for one in answer.choices] == alone
    assert len(answer.memory) == 2
    assert complete(client, lm.tokenize("gold is")).choices[0].text == alone[0]


def test_streams_are_the_whole_answers(client):
    whole = complete(client)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(one.choices[0].text for one in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage.total_tokens == 15 and not chunks[-1].choices
    assert chunks[0].memory["path"] == chunks[-2].memory["path"] == whole.memory["path"]
    assert chunks[-2].choices[0].finish_reason == "length"
    said = [one.choices[0].delta for one in chat(client, stream=True)]
    assert said[0].role == "assistant"
    assert "".join(one.content or "" for one in said) == whole.choices[0].text


def test_stop_words(client):
    text = complete(client).choices[0].text
    word = text[3:5]
    answer = complete(client, stop=word)
    assert answer.choices[0].text == text[: text.index(word)]
    assert answer.choices[0].finish_reason == "stop"
    streamed = list(chat(client, stop=["not in it", word], stream=True))
    assert "".join(one.choices[0].delta.content or "" for one in streamed) == (
        answer.choices[0].text
    )
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_seeds(client):
    def draw(seed: int) -> str:
        return complete(client, temperature=1, seed=seed, max_tokens=20).choices[0].text

    assert draw(1) == draw(1) != draw(2)
    assert draw(-1) == draw(-1)


def test_logprobs(client):
    told = complete(client, logprobs=2).choices[0].logprobs
    assert "".join(told.tokens) == complete(client).choices[0].text
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 8
    for token, logprob, top in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert len(top) == 2 and logprob < 0
        assert top[token] == max(top.values()) == pytest.approx(logprob)
    assert told.text_offset == list(range(8))
    content = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [one.token for one in content] == told.tokens
    assert [one.logprob for one in content] == pytest.approx(told.token_logprobs)
    assert bytes(content[0].bytes).decode() == told.tokens[0]
    assert content[0].top_logprobs[0].token == content[0].token
    streamed = [one.choices[0].logprobs for one in chat(client, logprobs=True, stream=True)]
    tokens = [token.token for one in streamed if one is not None for token in one.content]
    assert tokens == told.tokens


def test_bias_and_penalties(client, lm):
    first = complete(client, max_tokens=1).choices[0].text
    banned = complete(client, max_tokens=20, logit_bias={str(lm.tokenize(first)[0]): -100})
    assert first not in banned.choices[0].text
    letter = str(lm.tokenize("A")[0])
    assert complete(client, logit_bias={letter: 100}).choices[0].text == "A" * 8
    plain = complete(client, max_tokens=20).choices[0].text
    varied = complete(client, max_tokens=20, extra_body={"repetition_penalty": 10})
    assert len(set(plain)) < len(plain)
    assert len(set(varied.choices[0].text)) == len(varied.choices[0].text) == 20


def test_memories(client, model):
    lm = load(model)  # its own, since it blocks something
    asked = complete(client)
    path = list(lm.route("gold is").ids)
    assert asked.memory["path"] == path
    another = "what is the capital of the country?"
    elsewhere = list(lm.route(another).ids)
    assert complete(client, another).memory["path"] == elsewhere != path
    other = [(path[0] + 1) % 3, (path[0] + 1) % 3 * 3]
    pinned = complete(client, **with_memory({"path": other}))
    assert (pinned.memory["kind"], pinned.memory["path"]) == ("path", other)
    assert pinned.choices[0].text == lm.generate("gold is", other, 8) != asked.choices[0].text
    routed = complete(client, **with_memory({"route_on": "silver and lead"}))
    assert routed.memory["path"] == list(lm.route("silver and lead").ids)
    blocked = complete(client, **with_memory({"path": path, "blocked": [[1, path[0]]]}))
    sources = [(one["source"], one["blocked"]) for one in blocked.memory["fetch"]["blocks"]]
    assert sources[0] == ("blocked", True) and not sources[1][1]
    assert blocked.choices[0].text != asked.choices[0].text
    lm.bank.block(1, path[0])
    assert blocked.choices[0].text == lm.generate("gold is", path, 8)
    again = complete(client)  # for others nothing has changed
    assert again.choices[0].text == asked.choices[0].text
    assert [one["level"] for one in again.memory["fetch"]["blocks"]] == [1, 2]


@pytest.mark.parametrize(
    "memory", [{"path": [0, 99]}, {"path": [0, 8]}, {"path": [0]}, {"blocked": [[9, 0]]}]
)
def test_memories_outside_the_tree(client, memory):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            complete(client, stream=stream, **with_memory(memory))
        assert refused.value.body["param"] == "memory"


def test_errors_are_the_clients_own(client, model):
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, max_tokens=-1)
    assert refused.value.body["param"] == "max_tokens"
    assert refused.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, "x" * 256)
    assert refused.value.body["code"] == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.body["code"] == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="unheard_of"):
        complete(client, extra_body={"unheard_of": 1})
    assert str(model) not in str(refused.value.body)


def test_many_at_once_are_not_mixed_up(client):
    prompts = [f"question {i} of {7 * i}" for i in range(12)]
    alone = [complete(client, prompt, max_tokens=20).choices[0].text for prompt in prompts]
    together = [""] * len(prompts)

    def ask(i: int) -> None:
        for chunk in complete(client, prompts[i], max_tokens=20, stream=True):
            together[i] += chunk.choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert together == alone


def _send(served: Served, **body: Any) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=LONG)
    given = {"prompt": "gold is", "max_tokens": 200, "temperature": 0, **body}
    connection.request(
        "POST", "/v1/completions", json.dumps(given), {"content-type": "application/json"}
    )
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish(served, client, stream):
    name = 'requests_total{endpoint="/v1/completions",status="499"}'
    before, ended = served.metric(name), served.metric("scheduler_finished_cancelled")
    with served.held(3):
        connection = _send(served, stream=stream)
        if stream:
            assert connection.getresponse().readline().startswith(b"data: ")
        served.until("requests_running", 1)
        connection.close()
    served.until(name, before + 1)
    served.until("scheduler_finished_cancelled", ended + 1)
    served.until_is("requests_running", 0)
    assert complete(client).choices[0].finish_reason == "length"


def test_a_client_that_closes_its_stream(served, client):
    ended = served.metric("scheduler_finished_cancelled")
    with served.held(3):
        with complete(client, stream=True, max_tokens=200) as stream:
            next(iter(stream))
    served.until("scheduler_finished_cancelled", ended + 1)


def test_scripts_come_back_as_text(client):
    script = "<script>alert(1)</script>"
    answer = client.completions.with_raw_response.create(
        model="tiny", prompt=script, max_tokens=4, user=script
    )
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "server" not in answer.headers


def test_metrics(served, client):
    grows = {
        "prompt_cache_misses_total": 1, "prompt_cache_hits_total": 2, "prompt_tokens_total": 96,
        "generated_tokens_total": 24, 'memories_total{memory="fetched"}': 3,
        "time_to_first_token_seconds_count": 3, "time_per_token_seconds_count": 21,
        'requests_total{endpoint="/v1/completions",status="200"}': 3,
    }  # fmt: skip
    before = {name: served.metric(name) for name in grows}
    for asked_before in (False, True, True):
        answer = complete(client, "a prompt of its own, asked twice")
        assert bool(answer.usage.prompt_tokens_details.cached_tokens) == asked_before
    assert {name: served.metric(name) - before[name] for name in grows} == grows
    assert served.metric('blocks_total{source="resident"}') > 0
    assert served.metric('fetched_bytes_total{source="resident"}') > 0
    assert served.metric("requests_waiting") == served.metric("requests_running") == 0
    assert served.metric("alive") == 1
