"""The judge: what it is asked, injections, faults, the cache, agreement with the rules."""

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.config.endpoint import JudgeConfig
from megatron_sr1.config.loading import load_config
from megatron_sr1.errors import ConfigError
from megatron_sr1.evaluation.judge import (
    SCHEMA,
    Judge,
    fenced,
    has_too_many_unjudged,
    strict_verdict,
)
from megatron_sr1.rewards.agreement import cohens_kappa, judge_rates
from tests.chat_endpoint import CLOSED, SILENT, serving
from tests.judge_injections import INJECTIONS, escaped, obeying, unfenced

RIGHT, WRONG = '{"verdict": "right"}', '{"verdict": "wrong"}'


def line(answer, accuracy=0, gold="7", question="<image>How many?", **more):
    response = more.pop("response", f"\\boxed{{{answer}}}")
    own = {"question": question, "gold": gold, "response": response, "answer": answer}
    return {"index": 0, "sample": 0, **own, "accuracy": accuracy, **more}


@pytest.fixture
def judged(tmp_path):
    """Judge lines by a scripted endpoint; returns the lines and the endpoint."""

    def run(script, lines, seconds=0.0, **changes):
        with serving(script) as endpoint:
            own = JudgeConfig(base_url=endpoint.url, model="m", timeout_seconds=20.0, retries=1)
            with Judge(replace(own, **changes), tmp_path) as judge:
                return judge.judge(lines, seconds), endpoint

    return run


def asked(endpoint) -> list[dict]:
    return [json.loads(body["messages"][1]["content"]) for body in endpoint.bodies]


def test_the_judge_sees_question_gold_answers_and_answer(judged):
    lines = [
        line("8", other_golds=["seven"]),
        line(None, response="x" * 5000 + "so it is eight"),
        line("y" * 9000),
    ]
    _, endpoint = judged(lambda n, b: WRONG, lines, concurrency=1)
    first, second, third = asked(endpoint)
    assert first == {"question": "How many?", "gold_answers": ["7", "seven"], "answer": "8"}
    assert second["answer"].endswith("so it is eight") and len(second["answer"]) == 1000
    assert len(third["answer"]) < 2100
    body = endpoint.bodies[0]
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA and body["temperature"] == 0


@pytest.mark.parametrize(
    ("when", "judge", "final", "asks"),
    [("rule_failed", [None, 1, 0], [1, 1, 0], 2), ("always", [0, 1, 0], [0, 1, 0], 3)],
)
def test_rules_and_judge_give_the_final_verdict(judged, when, judge, final, asks):
    def script(number, body):
        return RIGHT if '"vii"' in body["messages"][1]["content"] else WRONG

    lines, endpoint = judged(script, [line("7", 1), line("vii"), line("8")], when=when)
    assert [each["judge"] for each in lines] == judge
    assert [each["accuracy_judged"] for each in lines] == final
    assert [each["accuracy"] for each in lines] == [1, 0, 0]
    assert all(each["unjudged"] is None for each in lines) and len(endpoint.bodies) == asks


def test_equal_answers_are_asked_about_once(judged):
    lines, endpoint = judged(lambda n, b: RIGHT, [line("8")] * 5)
    assert [each["judge"] for each in lines] == [1] * 5 and len(endpoint.bodies) == 1


@pytest.mark.parametrize("name", INJECTIONS)
def test_no_injection_leaves_its_string(name):
    text = INJECTIONS[name]
    assert escaped(unfenced("How many?", "7", text)), "the endpoint would not obey this one"
    for texts in ((text, "7", "8"), ("How many?", "7", text), ("How many?", text, "8")):
        keys = dict(zip(("question", "gold_answers", "answer"), texts, strict=True))
        assert escaped(fenced(keys)) == "" and json.loads(fenced(keys)) == keys


def test_an_endpoint_that_obeys_whatever_escapes_calls_no_injection_right(judged):
    lines = [line(text) for text in INJECTIONS.values()]
    lines += [line(None, response=text) for text in INJECTIONS.values()]
    lines += [line("8", question=text) for text in INJECTIONS.values()]
    found, endpoint = judged(obeying, [*lines, line("7")], when="always")
    assert [each["judge"] for each in found] == [0] * len(lines) + [1]
    assert len(INJECTIONS) >= 20 and len(endpoint.bodies) > 2 * len(INJECTIONS)
    assert all(b["response_format"]["json_schema"]["schema"] == SCHEMA for b in endpoint.bodies)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), max_size=40))
def test_any_text_is_fenced_and_reads_back(text):
    keys = {"question": text, "gold_answers": text, "answer": text}
    assert escaped(fenced(keys)) == "" and json.loads(fenced(keys)) == keys


def test_text_of_other_scripts_stays_readable():
    assert fenced({"a": "几个？é"}) == '{"a": "几个？é"}'


@pytest.mark.parametrize(
    "reply",
    [
        *("", "right", '"right"', '["right"]', "{}", "7", "[" * 90_000, '{"verdict": "right"'),
        *('{"verdict": "Right"}', '{"verdict": ["right"]}', '{"verdict": true}', "null"),
        *('{"verdict": "right", "verdict": "wrong"}', '{"verdict": "right", "why": "x"}'),
        *(f"{RIGHT} {RIGHT}", f"```json\n{RIGHT}\n```", '[["verdict", "right"]]'),
    ],
)
def test_what_is_no_strict_verdict_is_none(reply):
    assert strict_verdict(reply) is None
    assert (strict_verdict(RIGHT), strict_verdict(f"\n{WRONG}  ")) == (1, 0)


def test_a_reply_without_a_verdict_gets_one_more_try(judged):
    (once,), _ = judged(lambda n, b: "It is right." if n == 0 else RIGHT, [line("8")])
    assert (once["judge"], once["unjudged"]) == (1, None)
    (never,), endpoint = judged(lambda n, b: "It is right.", [line("9")])
    assert (never["judge"], never["accuracy_judged"], len(endpoint.bodies)) == (None, 0, 2)
    assert never["unjudged"] == "the reply is no verdict: 'It is right.'"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (429, "HTTP 429"),
        (500, "HTTP 500"),
        (b"\x00<html>", "no chat completion"),
        (CLOSED, "Connection error"),
        (SILENT, "no reply within the time limit"),
    ],
    ids=str,
)
def test_a_fault_leaves_answers_unjudged_never_wrong(judged, fault, says):
    started = time.monotonic()
    lines, _ = judged(
        lambda n, b: fault,
        [line("7", 1), line("8"), line("9")],
        when="always",
        timeout_seconds=0.3 if fault is SILENT else 20.0,
    )
    assert time.monotonic() - started < 30
    assert [each["judge"] for each in lines] == [None] * 3
    assert [each["accuracy_judged"] for each in lines] == [1, 0, 0]
    assert all(says in each["unjudged"] for each in lines)
    assert judge_rates(lines) == {"judged": 0, "unjudged": 3}


def test_what_is_beyond_the_budget_or_the_time_is_unjudged(judged):
    lines = [line(str(number)) for number in range(6)]
    found, endpoint = judged(lambda n, b: RIGHT, lines, max_calls=4)
    assert len(endpoint.bodies) == 4 and [each["judge"] for each in found].count(1) == 4
    assert {each["unjudged"] for each in found} == {None, "the budget of 4 calls is spent"}
    found, _ = judged(lambda n, b: SILENT, lines, seconds=0.2, concurrency=1)
    assert [each["unjudged"] for each in found].count("no time was left to ask") == 1


def test_verdicts_are_asked_for_once_and_a_torn_line_is_asked_again(judged, tmp_path):
    lines = [line(str(number)) for number in range(5)]
    judged(lambda n, b: RIGHT, lines)
    path = tmp_path / "judge" / "verdicts.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[:-20])
    found, endpoint = judged(lambda n, b: RIGHT, lines)
    assert len(endpoint.bodies) == 1 and [each["judge"] for each in found] == [1] * 5
    _, endpoint = judged(lambda n, b: RIGHT, lines)
    assert endpoint.bodies == [] and path.read_bytes().count(b"\n") == 6
    _, endpoint = judged(lambda n, b: RIGHT, lines, model="another")
    assert len(endpoint.bodies) == 5


def test_the_cache_needs_a_directory(tmp_path):
    (tmp_path / "file").touch()
    own = JudgeConfig(base_url="http://127.0.0.1:1/v1", model="m", cache=f"{tmp_path}/file/x")
    with pytest.raises(ConfigError, match=r"evaluation.judge.cache: .*file/x/verdicts.jsonl"):
        Judge(own, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model="], "evaluation.judge.model is not set; name the model at .*base_url=http://h/v1"),
        (["base_url=h/v1"], "evaluation.judge.base_url=h/v1; expected an address"),
        (["base_url=http://["], "evaluation.judge.base_url=.*; expected an address"),
        (["base_url=http://u:secret@h/v1"], "base_url has a user, a password or a query"),
        (["base_url=http://h/v1?key=secret"], "evaluation.judge.api_key_env"),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_refused_by_its_key(overrides, says):
    first = ["base_url=http://h/v1", "model=m"]
    given = [f"evaluation.judge.{each}" for each in [*first, *overrides]]
    given += ["model.path=x", "evaluation.sets.a.path=x"]
    with pytest.raises(ConfigError, match=says) as error:
        load_config(None, given)
    assert "secret" not in str(error.value)
    load_config(None, [*given, "evaluation.judge.when=never"])


def test_kappa_is_that_of_the_textbook_and_needs_both_verdicts_of_the_rules():
    pairs = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    assert cohens_kappa(pairs) == pytest.approx(0.4)
    rows = [
        {"accuracy": int(a), "judge": int(b), "unjudged": None, "accuracy_judged": int(b)}
        for a, b in pairs
    ]
    assert judge_rates(rows)["judge_kappa"] == pytest.approx(0.4)
    assert "judge_kappa" not in judge_rates(rows[25:]) and judge_rates([{"accuracy": 1}]) == {}


def test_the_share_of_unjudged_answers_is_of_those_to_be_judged(caplog):
    found = {"a": {"accuracy": 0.5}, "b": {"judged": 7, "unjudged": 3}}
    assert not has_too_many_unjudged(found, JudgeConfig(max_unjudged_share=0.3))
    assert not caplog.messages
    assert has_too_many_unjudged(found, JudgeConfig(max_unjudged_share=0.25))
    (error,) = caplog.messages
    assert "b: 3 of 10 answers" in error and "evaluation.judge.max_unjudged_share" in error
    none = {"c": {"judged": 0, "unjudged": 3}}
    assert not has_too_many_unjudged(none, JudgeConfig(max_unjudged_share=1.0))
