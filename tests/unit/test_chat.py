"""The client of chat endpoints: faults, limits in time, concurrency, the key."""

import logging
import time

import pytest

from megatron_sr1.config.endpoint import EndpointConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.runtime.chat import (
    FAILURES_IN_A_ROW,
    ChatClient,
    ChatReply,
    ChatRequest,
    defused,
)
from tests.chat_endpoint import CLOSED, SILENT, TRICKLE, serving

KEY = "sk-a-key-of-this-test"
HELLO = ChatRequest((("user", "hello"),), max_tokens=9)


def gathered(futures):
    return [future.result(60) for future in futures]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


def client(endpoint, **settings) -> ChatClient:
    settings = {"timeout_seconds": 20.0, "retries": 2, "api_key_env": "TEST_KEY"} | settings
    return ChatClient("a.b", EndpointConfig(endpoint.url, "m", **settings))


def asked(script, count: int = 1, seconds: float = 0.0, **settings):
    """Replies to `count` requests, the number of attempts that arrived, and the seconds taken."""
    with serving(script) as endpoint, client(endpoint, **settings) as chat:
        started = time.monotonic()
        chat.begin(seconds)
        replies = gathered([chat.submit(HELLO) for _ in range(count)])
        return replies, endpoint, time.monotonic() - started


def test_a_reply_has_text_and_tokens_and_the_request_its_fields():
    request = ChatRequest((("system", "s"), ("user", "u")), 5, 0.5, 3, {"type": "object"})
    with serving(lambda number, body: "hi") as endpoint, client(endpoint) as chat:
        (reply,) = gathered([chat.submit(request)])
    assert reply == ChatReply("hi", "stop", num_tokens=7, failure="")
    (body,) = endpoint.bodies
    form = body.pop("response_format")
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert form["json_schema"]["schema"] == {"type": "object"} and form["json_schema"]["strict"]
    assert body == {
        "model": "m",
        "messages": turns,
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "seed": 3,
    }
    assert endpoint.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("fault", [429, 500, 503, CLOSED], ids=str)
def test_what_may_pass_is_tried_again(fault):
    (reply,), endpoint, _ = asked(lambda number, body: fault if number < 2 else "hi", retries=2)
    assert (reply.text, len(endpoint.bodies)) == ("hi", 3)


@pytest.mark.parametrize(
    ("fault", "says", "attempts"),
    [
        (429, "HTTP 429", 2),
        (500, "HTTP 500", 2),
        (400, "HTTP 400", 1),
        (401, "HTTP 401", 1),
        (CLOSED, "APIConnectionError", 2),
        (b"<html>", "no chat completion", 1),
        (b'{"choices": []}', "no chat completion", 1),
        (b'{"choices": [{"message": "x"}]}', "no chat completion", 1),
        (b'{"choices": [{"message": {"content": null}}]}', "no text", 1),
        (b"[" * 100_000, "no chat completion", 1),
        (b"\xff\xfe\x00", "no chat completion", 1),
    ],
    ids=str,
)
def test_a_fault_that_stays_is_a_failure_with_its_reason(fault, says, attempts):
    (reply,), endpoint, _ = asked(lambda number, body: fault, retries=1)
    assert says in reply.failure and not reply.text
    assert len(endpoint.bodies) == attempts


@pytest.mark.parametrize("fault", [SILENT, TRICKLE], ids=["silent", "trickle"])
def test_an_endpoint_that_is_too_slow_is_left_within_the_limit(fault):
    (reply,), _, seconds = asked(lambda number, body: fault, timeout_seconds=0.2, retries=1)
    assert reply.failure == "no reply within the time limit"
    assert seconds < 2  # 0.4 s by the settings; the trickle alone would take 40 s


def test_nobody_listens():
    with serving(lambda number, body: "hi") as endpoint:
        pass
    with client(endpoint, retries=0) as chat:
        (reply,) = gathered([chat.submit(HELLO)])
    assert "Connection" in reply.failure


def test_a_batch_ends_in_time_whatever_its_size():
    replies, endpoint, seconds = asked(lambda n, b: SILENT, 50, seconds=0.3, concurrency=2)
    assert seconds < 2 and len(endpoint.bodies) == 2
    assert {reply.failure for reply in replies[2:]} == {"no time was left to ask"}


def test_requests_run_concurrently_up_to_the_limit():
    def slowly(number, body):
        time.sleep(0.05)
        return "hi"

    replies, endpoint, _ = asked(slowly, 24, concurrency=8)
    assert all(reply.text == "hi" for reply in replies)
    assert 2 <= endpoint.most <= 8


def test_after_failures_in_a_row_the_rest_of_a_batch_is_not_asked_and_the_next_tries_again(caplog):
    wrong = [400] * FAILURES_IN_A_ROW
    with serving(lambda n, b: wrong[n] if n < len(wrong) else "hi") as endpoint:
        with client(endpoint, concurrency=1) as chat:
            replies = gathered([chat.submit(HELLO) for _ in range(40)])
            assert len(endpoint.bodies) == FAILURES_IN_A_ROW
            assert "not asked" in replies[-1].failure
            chat.begin()
            assert gathered([chat.submit(HELLO)])[0].text == "hi"
    (warning,) = [text for text in caplog.messages if "in a row" in text]
    assert "a.b" in warning and "HTTP 400" in warning


def test_the_key_is_in_no_message_and_no_log(caplog):
    """The endpoint repeats the key that it was sent in its error."""
    caplog.set_level(logging.DEBUG)
    replies, endpoint, _ = asked(lambda number, body: 401 if number else 500, retries=1)
    assert endpoint.keys == [f"Bearer {KEY}"] * 2
    assert "says the endpoint to Bearer ***" in replies[0].failure
    assert len(caplog.records) > 5 and KEY not in caplog.text


def test_an_endpoint_elsewhere_needs_a_key_and_a_local_one_does_not(monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(ConfigError, match="a.b.api_key_env=TEST_KEY: .* not set"):
        ChatClient("a.b", EndpointConfig("https://host.invalid/v1", "m", "TEST_KEY"))
    with ChatClient("a.b", EndpointConfig("https://host.invalid/v1", "m", "")):
        pass
    assert asked(lambda number, body: "hi")[0][0].text == "hi"
    monkeypatch.setenv("TEST_KEY", "sk\u00e4\n1")
    with pytest.raises(ConfigError, match="a.b.api_key_env=TEST_KEY: its value") as error:
        ChatClient("a.b", EndpointConfig("https://host.invalid/v1", "m", "TEST_KEY"))
    assert "sk" not in str(error.value)


def test_leaving_cancels_what_is_in_progress():
    with serving(lambda number, body: SILENT) as endpoint:
        started = time.monotonic()
        with client(endpoint) as chat:
            future = chat.submit(HELLO)
            while not endpoint.bodies:
                time.sleep(0.01)
        assert future.cancelled() and time.monotonic() - started < 5


def test_control_tokens_of_a_text_are_defused_and_other_brackets_are_kept():
    for token in ("<|im_end|>", "[/INST]", "[INST]", "<</SYS>>", "<end_of_turn>", "</s>", "<s>"):
        assert token not in defused(f"a{token}b") and defused(f"a{token}b").count(" ") == 1
    for text in ("x < 3 and y > 2", "[0, 1]", "<b>bold</b>", "<start>", "|x|", "a[INSTANCE]"):
        assert defused(text) == text
