"""Requests, read strictly: what each field may be, and the error of what it may not."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_hiermem.serving.errors import public
from mlx_hiermem.serving.job import Sampling
from mlx_hiermem.serving.memory import MemoryChoice
from tests.serving.fakes import FETCH, Asker

USER = {"role": "user", "content": "gold is"}
HUGE = 10**400


@pytest.fixture(scope="module")
def asker() -> Asker:
    return Asker()


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of an answer that is one, and is shaped as OpenAI's are."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) <= 300
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert answer.headers["content-type"] == "application/json"
    return error


# ---- what is understood ----------------------------------------------------------------


def test_a_whole_completion(asker):
    answer = asker.complete(max_tokens=5, logprobs=2).json()
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, "hello", "stop")
    assert choice["logprobs"] == {
        "tokens": ["he", "llo"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"he": -0.5, "ho": -2.0}, {"llo": -9999.0}],
        "text_offset": [0, 2],
    }
    assert answer["usage"] == {
        "prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }  # fmt: skip
    assert answer["memory"] == {"kind": "fetched", "path": [2, 7], "fetch": FETCH}
    assert asker.scheduler.job.tokens == list(b"gold is")
    assert asker.scheduler.job.text == "gold is"


def test_a_whole_chat(asker):
    answer = asker.chat(logprobs=True, top_logprobs=1).json()
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    first, second = choice["logprobs"]["content"]
    assert first == {
        "token": "he", "logprob": -0.5, "bytes": [104, 101],
        "top_logprobs": [{"token": "he", "logprob": -0.5, "bytes": [104, 101]}],
    }  # fmt: skip
    assert second["logprob"] == -9999.0


def test_no_logprobs_are_told_unasked(asker):
    assert asker.complete().json()["choices"][0]["logprobs"] is None
    assert asker.scheduler.job.top_logprobs is None
    asker.chat(logprobs=True)
    assert asker.scheduler.job.top_logprobs == 0


def read_stream(answer: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream that ends as it should."""
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines.pop() == "" and lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_stream_of_a_chat(asker):
    chunks = read_stream(asker.chat(stream=True, stream_options={"include_usage": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    *told, last = chunks
    assert [chunk["choices"][0]["delta"] for chunk in told] == [
        {"role": "assistant", "content": ""}, {"content": "he"}, {"content": "llo"}, {}
    ]  # fmt: skip
    assert [chunk["choices"][0]["finish_reason"] for chunk in told] == [None, None, None, "stop"]
    assert [("memory" in chunk) for chunk in chunks] == [True, False, False, True, False]
    assert told[0]["memory"] == told[-1]["memory"] == {
        "kind": "fetched", "path": [2, 7], "fetch": FETCH
    }  # fmt: skip
    assert {chunk["usage"] for chunk in told} == {None}
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 9


def test_a_stream_of_a_completion_with_logprobs(asker):
    chunks = read_stream(asker.complete(stream=True, logprobs=1))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello"
    assert "usage" not in chunks[0]
    offsets = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [one and one["text_offset"] for one in offsets] == [None, [0], [2], None]


def test_several_prompts_are_several_choices(asker):
    answer = asker.complete(prompt=["one", [116, 119, 111]]).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert len(answer["memory"]) == 2
    assert answer["usage"]["prompt_tokens"] == 6
    one, two = (handle.job for handle in asker.scheduler.handles[-2:])
    assert (one.text, two.text, two.tokens) == ("one", "two", [116, 119, 111])
    chunks = read_stream(asker.complete(prompt=["one", "two"], stream=True))
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["hello", "hello"]


def test_the_knobs_reach_the_job(asker):
    asker.complete(
        max_tokens=3, temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, seed=-1, stop=["a", "b"],
        frequency_penalty=1, presence_penalty=-1, repetition_penalty=1.5, logit_bias={"65": -100},
        user="somebody",
    )  # fmt: skip
    job = asker.scheduler.job
    assert job.sampling == Sampling(0.5, 0.9, 4, 0.1, 2**64 - 1, 1.0, -1.0, 1.5, {65: -100.0})
    assert (job.max_tokens, job.stop) == (3, ("a", "b"))
    asker.chat(max_completion_tokens=4, stop="x", top_k=257, top_p=0)
    job = asker.scheduler.job
    assert (job.max_tokens, job.stop, job.sampling) == (4, ("x",), Sampling(0.0))
    asker.chat(max_tokens=None, stop=None, temperature=None, n=1, tools=[], model="tiny")
    assert asker.scheduler.job.max_tokens == 2048


@pytest.mark.parametrize(
    "given, choice",
    [
        (None, MemoryChoice()),
        ("fetched", MemoryChoice()),
        ("generic", MemoryChoice("generic")),
        ("none", MemoryChoice("none")),
        ({}, MemoryChoice()),
        ({"path": [1, 5]}, MemoryChoice("path", (1, 5))),
        ({"route_on": "silver"}, MemoryChoice(route_on="silver")),
        ({"blocked": [[1, 0], [2, 3]]}, MemoryChoice(blocked=frozenset({(1, 0), (2, 3)}))),
        (
            {"path": [1, 5], "blocked": [[1, 0], [1, 0]]},
            MemoryChoice("path", (1, 5), blocked=frozenset({(1, 0)})),
        ),
        (
            {"route_on": "x", "path": None, "blocked": []},
            MemoryChoice(route_on="x"),
        ),
    ],
)
def test_memory(asker, given, choice):
    assert asker.complete(memory=given).status_code == 200
    assert asker.scheduler.job.memory == choice


def test_messages_of_parts_and_roles(asker):
    messages = [
        {"role": "developer", "content": "be short"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "go"}, {"type": "text", "text": "ld"}],
        },
        {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "silver", "name": "me"},
        {"role": "assistant", "content": ""},
    ]
    assert asker.chat(messages=messages).status_code == 200
    assert bytes(asker.scheduler.job.tokens) == b"be shortgoldyessilver"
    assert asker.scheduler.job.text == "silver"


def test_scripts_are_text(asker):
    script = "<script>alert(1)</script>\u2028\x85 & \x00"
    answer = asker.complete(prompt=script)
    assert asker.scheduler.job.text == script
    assert answer.headers["content-type"] == "application/json"
    error = refused(asker.complete(**{"<img src=x>\n\ud800": 1}))
    assert error["param"] == "<img src=x>\\n\\ud800"


# ---- what is not -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("prompt", None), ("prompt", ""), ("prompt", " \n"), ("prompt", []), ("prompt", 5),
        ("prompt", [[]]), ("prompt", [257]), ("prompt", [-1]), ("prompt", [True]),
        ("prompt", [1.0]), ("prompt", [HUGE]), ("prompt", {"a": 1}), ("prompt", "\ud800"),
        ("prompt", ["a"] * 17), ("prompt", ["a", 1]), ("prompt", [1, "a"]),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2049), ("max_tokens", HUGE),
        ("max_tokens", 1.0), ("max_tokens", "1"), ("max_tokens", True),
        ("max_completion_tokens", 0),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", HUGE),
        ("temperature", True), ("top_p", -0.1), ("top_p", 1.1), ("top_k", -1), ("top_k", 0.5),
        ("min_p", 1.5), ("min_p", -HUGE), ("seed", 1.5), ("seed", HUGE), ("seed", -(2**63) - 1),
        ("frequency_penalty", 2.5), ("presence_penalty", -2.5), ("repetition_penalty", -1),
        ("repetition_penalty", 1e-9), ("repetition_penalty", 11),
        ("stop", ""), ("stop", 1), ("stop", ["a", None]), ("stop", ["a"] * 17),
        ("stop", "a" * 1001), ("stop", "\udfff"),
        ("logit_bias", []), ("logit_bias", {"x": 1}), ("logit_bias", {"257": 1}),
        ("logit_bias", {"-1": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"01": 1}),
        ("logit_bias", {"1": None}), ("logit_bias", {str(HUGE): 1}),
        ("logit_bias", {"\u0661": 1}),
        ("logprobs", True), ("logprobs", 21), ("logprobs", -1),
        ("stream", 1), ("stream_options", {}), ("stream_options", 1),
        ("n", 2), ("n", True), ("n", "1"), ("echo", True), ("suffix", "x"), ("best_of", 2),
        ("user", 5), ("user", "x" * 513), ("model", 5), ("unheard_of", 1), ("unheard_of", None),
        ("messages", [USER]), ("tools", []),
    ],
)  # fmt: skip
def test_fields_of_a_completion(asker, field, value):
    before = len(asker.scheduler.handles)
    error = refused(asker.complete(**{field: value}))
    assert error["param"].split("[")[0] == field
    assert error["message"].startswith(field)
    assert len(asker.scheduler.handles) == before


@pytest.mark.parametrize(
    "field, value, param",
    [
        ("messages", None, "messages"), ("messages", [], "messages"), ("messages", 5, "messages"),
        ("messages", ["x"], "messages[0]"), ("messages", [{}], "messages[0].role"),
        ("messages", [{"role": "user"}], "messages[0].content"),
        ("messages", [{**USER, "content": ""}], "messages"),
        ("messages", [{**USER, "content": 5}], "messages[0].content"),
        ("messages", [{**USER, "content": "\ud800"}], "messages[0].content"),
        ("messages", [USER, {**USER, "role": "tool"}], "messages[1].role"),
        ("messages", [{**USER, "role": ["user"]}], "messages[0].role"),
        ("messages", [{**USER, "weight": 1}], "messages[0].weight"),
        ("messages", [{**USER, "tool_calls": [1]}], "messages[0].tool_calls"),
        ("messages", [{**USER, "content": [{"type": "image_url", "image_url": {}}]}],
         "messages[0].content[0].type"),
        ("messages", [{**USER, "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ("messages", [{**USER, "content": [[]]}], "messages[0].content[0]"),
        ("logprobs", 1, "logprobs"), ("top_logprobs", 2, "top_logprobs"), ("n", 3, "n"),
        ("tools", [{}], "tools"), ("response_format", {"type": "json_object"}, "response_format"),
        ("tool_choice", "required", "tool_choice"), ("reasoning_effort", "low", "reasoning_effort"),
        ("prompt", "x", "prompt"), ("echo", True, "echo"),
    ],
)  # fmt: skip
def test_fields_of_a_chat(asker, field, value, param):
    assert refused(asker.chat(**{field: value}))["param"] == param


@pytest.mark.parametrize(
    "given, param",
    [
        ("path", "memory"), (5, "memory"), ([1, 2], "memory"), ({"kind": "none"}, "memory.kind"),
        ({"path": []}, "memory.path"), ({"path": "1"}, "memory.path"),
        ({"path": [True]}, "memory.path"), ({"path": [-1]}, "memory.path"),
        ({"path": [HUGE]}, "memory.path"), ({"path": [0] * 65}, "memory.path"),
        ({"path": [1], "route_on": "x"}, "memory"),
        ({"route_on": " "}, "memory.route_on"), ({"route_on": 5}, "memory.route_on"),
        ({"route_on": "\ud800"}, "memory.route_on"),
        ({"route_on": "x" * 20_001}, "memory.route_on"),
        ({"blocked": [1]}, "memory.blocked"), ({"blocked": [[1]]}, "memory.blocked"),
        ({"blocked": [[0, 1]]}, "memory.blocked"), ({"blocked": [[1, -1]]}, "memory.blocked"),
        ({"blocked": {}}, "memory.blocked"), ({"blocked": [[1, 1]] * 4097}, "memory.blocked"),
    ],
)  # fmt: skip
def test_memories_that_are_none(asker, given, param):
    assert refused(asker.complete(memory=given))["param"] == param


def test_max_tokens_twice(asker):
    assert asker.chat(max_tokens=3, max_completion_tokens=3).status_code == 200
    refused(asker.chat(max_tokens=3, max_completion_tokens=4))


def test_stream_options_belong_to_a_stream(asker):
    refused(asker.chat(stream_options={"include_usage": True}))
    refused(asker.chat(stream=True, stream_options={"include_usage": 1}))
    refused(asker.chat(stream=True, stream_options={"usage": True}))


def test_another_model(asker):
    error = refused(asker.chat(model="/etc/passwd"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "GET /v1/models lists" in error["message"]


@pytest.mark.parametrize("prompt", ["x" * 64, [1] * 64, ["short", "x" * 64], [[1] * 3, [1] * 64]])
def test_a_prompt_beyond_the_context(asker, prompt):
    error = refused(asker.complete(prompt=prompt))
    assert error["code"] == "context_length_exceeded"
    refused(asker.chat(messages=[{**USER, "content": "x" * 64}]))


def test_a_text_that_cannot_fit_is_not_even_made_tokens():
    """It would take the tokenizer seconds, and others would wait for it."""
    asker = Asker()
    texts = []

    def tokens(text: Any) -> list[int]:
        texts.append(text)
        return [1]

    asker.scheduler.tokenize = asker.scheduler.tokenize_chat = tokens
    long, longer = "x" * (64 * 64), "x" * (64 * 64 + 1)
    for template in (True, False):
        asker.facts.has_chat_template = template
        for answer in (
            asker.complete(prompt=longer),
            asker.complete(prompt=["short", longer]),
            asker.chat(messages=[{**USER, "content": longer}]),
        ):
            error = refused(answer)
            assert error["code"] == "context_length_exceeded"
            assert "4097 characters" in error["message"]
    assert set(texts) == {"short"}
    several = [{**USER, "content": long}, USER]
    assert asker.chat(messages=several).status_code == 200  # without a template it is the last one
    asker.facts.has_chat_template = True
    refused(asker.chat(messages=several))
    assert asker.complete(prompt=long).status_code == 200


@pytest.mark.parametrize(
    "body, word",
    [
        (b"", "JSON"), (b"{", "JSON"), (b"[]", "a list"), (b"null", "null"), (b'"x"', "object"),
        (b'{"prompt": "\xff"}', "UTF-8"), (b'\xef\xbb\xbf{"prompt": "x"}', "JSON"),
        ('{"prompt": "x"}'.encode("utf-16"), "UTF-8"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"prompt": "x", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "x", "temperature": 1e999}', "too large"),
        (b'{"prompt": "x", "prompt": "y"}', "twice"),
        (b'{"prompt": "x", "memory": {"path": [1], "path": [2]}}', "twice"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeply"),
        (b'{"prompt": ' + b'{"a":' * 100_000, "deeply"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"prompt": "a\nb"}', "JSON"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_json(asker, body, word):
    headers = {"content-type": "application/json"}
    answer = asker.ask("POST", "/v1/completions", content=body, headers=headers)
    assert word in refused(answer)["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)  # fmt: skip
def test_bodies_of_another_type(asker, headers):
    answer = asker.ask("POST", "/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    refused(answer, 415)


def test_types_that_are_json(asker):
    for kind in ("application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'):
        headers = {"content-type": kind}
        answer = asker.ask("POST", "/v1/completions", content=b'{"prompt": "x"}', headers=headers)
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/", 404), ("GET", "/v1", 404), ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/completions/", 404), ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/other", 404), ("GET", "/v1/models/a/b%0a", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404), ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/chat/completions", 405), ("POST", "/v1/models", 405),
        ("POST", "/health", 405), ("OPTIONS", "/v1/completions", 405),
    ],
)  # fmt: skip
def test_addresses(asker, method, path, status):
    answer = asker.ask(method, path)
    refused(answer, status)
    assert status != 405 or answer.headers["allow"]


def test_models_and_health(asker):
    listed = asker.ask("GET", "/v1/models").json()
    assert listed["object"] == "list" and [one["id"] for one in listed["data"]] == ["tiny"]
    assert asker.ask("GET", "/v1/models/tiny").json() == listed["data"][0]
    assert asker.ask("GET", "/health").json() == {"status": "ok", "model": "tiny"}


def test_no_message_names_a_file(asker):
    error = refused(asker.complete(prompt="unreadable"))
    assert "/home" not in error["message"] and "it cannot read this" in error["message"]
    assert public("/a/b c/d.bin: bad", ["/a/b c"]) == "the model's files/d.bin: bad"
    assert public("see ~/models/x, line 1\nand more") == "see a file, line 1 and more"
    assert public("/v1/models/tiny/memory: bad, /v1/modelsx/y") == "a file: bad, a file"
    assert len(public("x" * 1000)) == 300


# ---- anything --------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(
    "prompt messages model max_tokens temperature top_p top_k min_p seed stop logprobs n stream "
    "stream_options top_logprobs logit_bias memory user echo suffix tools".split()
)
LIKELY = st.sampled_from(
    [1, 0, -1, 0.5, True, "x", "fetched", [USER], ["x"], [1, 2], [[1, 2]], {"path": [1]},
     {"route_on": "x"}, {"blocked": [[1, 2]]}, {"include_usage": True}, {"1": 2}]
)  # fmt: skip
BODIES = st.dictionaries(NAMES, LIKELY | JSON, max_size=6)


@given(path=st.sampled_from(["/completions", "/chat/completions"]), body=BODIES | JSON)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_answered_or_refused(asker, path, body):
    answer = asker.post(path, body) if _is_json(body) else asker.post(path, {})
    if answer.status_code != 200:
        refused(answer, answer.status_code)
        assert 400 <= answer.status_code < 500


@given(known=BODIES)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_field_beside_a_good_prompt(asker, known):
    for name, path in (("prompt", "/completions"), ("messages", "/chat/completions")):
        good = {"prompt": "gold is", "messages": [USER]}[name]
        other = {key: value for key, value in known.items() if key not in ("prompt", "messages")}
        answer = asker.post(path, {**other, name: good})
        assert answer.status_code == 200 or refused(answer, answer.status_code)
        assert answer.status_code < 500


@given(body=st.binary(max_size=40))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused(asker, body):
    headers = {"content-type": "application/json"}
    refused(asker.ask("POST", "/v1/completions", content=body, headers=headers))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False).encode()
    except (ValueError, UnicodeEncodeError):
        return False
    return True
