"""SelfConsistency over an endpoint: against our server, and against one that fails in every way that a server can."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
sys.path.insert(0, str(Path(__file__).parent))

from calm_fast import SelfConsistency  # noqa: E402
from calm_fast.consistency import Endpoint, read_rows  # noqa: E402

QUESTIONS = [f"{i}+{i}?" for i in range(4)]
Answer = Callable[[dict[str, Any], int], Any]


def choice(text: str, chat: bool = True, logprobs: Any = (-0.5, -1.5)) -> dict[str, Any]:
    if chat:
        told = {"content": [{"token": "x", "logprob": p, "bytes": None, "top_logprobs": []} for p in logprobs]}
        message = {"role": "assistant", "content": text}
        return {"index": 0, "finish_reason": "stop", "message": message, "logprobs": told}
    return {"index": 0, "finish_reason": "stop", "text": text, "logprobs": {"token_logprobs": list(logprobs)}}


def many(request: dict[str, Any], count: int) -> dict[str, Any]:
    chat = "messages" in request
    return {"choices": [choice(f"The answer is {i % 3}.", chat) for i in range(count)]}


class Fake:
    """A server whose replies a function makes: (request, how many came before) -> JSON, bytes, or a status."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[dict[str, Any]] = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:  # noqa: N802, N805
                body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
                with lock:
                    before = len(self.requests)
                    self.requests.append(body | {"path": handler.path})
                reply = answer(body, before)
                status, content = (reply, b"{}") if isinstance(reply, int) else (200, reply)
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                handler.send_response(status)
                handler.send_header("content-type", "application/json")
                handler.send_header("retry-after-ms", "1")
                handler.send_header("content-length", str(len(content)))
                handler.end_headers()
                handler.wfile.write(content)

            def log_message(handler, *args: Any) -> None:  # noqa: N805
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Fake]]:
    monkeypatch.setattr("calm_fast.consistency.endpoint.client._LONGEST_WAIT", 0.01)
    made: list[Fake] = []

    def make(answer: Answer) -> Fake:
        made.append(Fake(answer))
        return made[-1]

    yield make
    for server in made:
        server.server.shutdown()
        server.server.server_close()


def voter(server: Fake, n: int = 5, retries: int = 2, parallel: int = 2, **changes: Any) -> SelfConsistency:
    endpoint = Endpoint(server.url, "m", retries=retries, parallel=parallel, timeout=changes.pop("timeout", 30))
    settings: dict[str, Any] = {"n": n, "progress": False, "equality": "exact", "max_new_tokens": 7} | changes
    return SelfConsistency(endpoint, **settings)


def test_n_samples_come_in_one_request_with_their_log_probabilities(fake: Any) -> None:
    server = fake(lambda request, before: many(request, request["n"]))
    results = voter(server, system="Be brief.", top_p=0.9, top_k=4, stop=("!",))(QUESTIONS)
    assert [len(result.rationales) for result in results] == [5] * 4 and len(server.requests) == 4
    assert results[0].answer == "0" and results[0].scores == pytest.approx([math.exp(-1.0)] * 5)
    by_question = {request["messages"][1]["content"]: request for request in server.requests}
    asked = by_question[QUESTIONS[0]]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."} and asked["path"].endswith(
        "chat/completions"
    )
    expected = {"n": 5, "logprobs": True, "temperature": 0.7, "top_p": 0.9, "top_k": 4, "stop": ["!"], "max_tokens": 7}
    assert {name: asked[name] for name in expected} == expected
    assert len({request["seed"] for request in server.requests}) == 4
    again = fake(lambda request, before: many(request, request["n"]))
    voter(again, prompt="Q: {question}\nA:", rule="count")(QUESTIONS)
    assert {request["prompt"] for request in again.requests} == {f"Q: {text}\nA:" for text in QUESTIONS}
    assert not any("logprobs" in request for request in again.requests)
    assert {request["seed"] for request in again.requests} == {request["seed"] for request in server.requests}


def test_a_server_that_gives_one_sample_is_asked_for_the_others(fake: Any) -> None:
    server = fake(lambda request, before: many(request, 1))
    results = voter(server)(QUESTIONS[:2])
    assert [len(result.rationales) for result in results] == [5, 5]
    assert [request.get("n", 1) for request in server.requests].count(5) == 2 and len(server.requests) == 10
    assert len({request["seed"] for request in server.requests}) == 10  # no two samples have one seed


def test_early_stopping_asks_in_rounds(fake: Any) -> None:
    def sure(request: dict[str, Any], before: int) -> Any:
        return {"choices": [choice("The answer is 7.") for _ in range(request.get("n", 1))]}

    server = fake(sure)
    results = voter(server, n=40, confidence=0.9)(QUESTIONS[:2])
    assert all(result.answer == "7" and 4 <= len(result.rationales) < 40 for result in results)


TROUBLE: list[Any] = [429, 503, b"no json", b'{"choices": []}', b'{"choices": null}', b"[]", b'"text"']
TROUBLE += [{"choices": [{"finish_reason": "stop"}]}, {"choices": [choice("a", logprobs=())]}]
TROUBLE += [{"choices": [choice("a", logprobs=(None,))]}, {"choices": [choice("a")] * 9}, {"choices": [7]}]
TROUBLE += [{"choices": [{**choice("a"), "message": {"content": None}}]}]


@pytest.mark.parametrize("trouble", TROUBLE, ids=lambda reply: str(reply)[:40])
def test_a_bad_reply_is_tried_again_and_then_an_error(fake: Any, trouble: Any) -> None:
    once = fake(lambda request, before: trouble if before == 0 else many(request, request["n"]))
    assert len(voter(once)(QUESTIONS[:1])[0].rationales) == 5 and len(once.requests) == 2
    always = fake(lambda request, before: trouble)
    with pytest.raises(RuntimeError, match="must give the samples of every question, got .* after 3 tries"):
        voter(always)(QUESTIONS[:1])
    assert len(always.requests) == 3


def test_a_timeout_is_an_error(fake: Any) -> None:
    waiting = threading.Event()
    server = fake(lambda request, before: waiting.wait(20) and None or 503)
    try:
        with pytest.raises(RuntimeError, match="APITimeoutError"):
            voter(server, retries=0, timeout=0.3)(QUESTIONS[:1])
    finally:
        waiting.set()


def test_a_refused_request_is_not_tried_again(fake: Any) -> None:
    server = fake(lambda request, before: 400)
    with pytest.raises(ValueError, match="`model` must be an endpoint at .* that takes the request, got status 400"):
        voter(server)(QUESTIONS[:1])
    assert len(server.requests) == 1


def test_a_run_that_fails_goes_on_where_it_was(fake: Any, tmp_path: Path) -> None:
    broken = [True]

    def answer(request: dict[str, Any], before: int) -> Any:
        if broken[0] and request["messages"][0]["content"] == QUESTIONS[2]:
            return 500
        return many(request, request["n"])

    server, out = fake(answer), tmp_path / "run.jsonl"
    with pytest.raises(RuntimeError, match="finished questions are in `out`"):
        voter(server, parallel=1, retries=0)(QUESTIONS, out=out)
    assert [row["question"] for row in read_rows(out, need_answer=False)] == QUESTIONS[:2]
    broken[0], before = False, len(server.requests)
    moved = fake(answer)  # the same model at another address
    results = voter(moved)(QUESTIONS, out=out)
    assert [result.question for result in results] == QUESTIONS and len(moved.requests) == 2
    assert len(server.requests) == before and all(len(result.rationales) == 5 for result in results)
    with pytest.raises(ValueError, match="other settings .*endpoint_model"):
        SelfConsistency(Endpoint(moved.url, "other"), n=5, progress=False, equality="exact", max_new_tokens=7)(
            QUESTIONS, out=out
        )


def test_bad_arguments_are_named() -> None:
    for changes, message in (
        ({"url": "localhost:1"}, "Endpoint: `url` must be a URL like http"),
        ({"model": ""}, "Endpoint: `model` must be a string that is not empty"),
        ({"parallel": 0}, "Endpoint: `parallel` must be an integer of at least 1"),
        ({"retries": -1}, "Endpoint: `retries` must be an integer of at least 0"),
        ({"timeout": 0}, "Endpoint: `timeout` must be above 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            Endpoint(**({"url": "http://127.0.0.1:1/v1", "model": "m"} | changes))
    endpoint = Endpoint("http://127.0.0.1:1/v1", "m")
    with pytest.raises(ValueError, match="`tokenizer` must be None with an Endpoint"):
        SelfConsistency(endpoint, object())
    with pytest.raises(ValueError, match="`chat_template_kwargs` must be None unless a chat template"):
        SelfConsistency(endpoint, prompt="plain", chat_template_kwargs={"enable_thinking": False})
    rows = [{"question": "a", "generated_answer": ["1"]}]
    with pytest.raises(ValueError, match="`rule` must be 'count' without scores"):
        SelfConsistency(endpoint, progress=False).from_samples(rows)


@pytest.mark.integration(tool="serve", what="`SelfConsistency(Endpoint(...))` over it", verdict="works")
def test_our_own_server_gives_the_samples_and_scores(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from served import NAME, composition, running

    model, tokenizer = composition(tmp_path)
    settings: dict[str, Any] = {"n": 3, "max_new_tokens": 6, "progress": False, "temperature": 1.0, "pattern": "."}
    with running(model, tokenizer) as url:
        found = SelfConsistency(Endpoint(url, NAME, retries=0), prompt="{question}", **settings)(QUESTIONS)
        again = SelfConsistency(Endpoint(url, NAME, retries=0), prompt="{question}", **settings)(QUESTIONS)
        chat = SelfConsistency(Endpoint(url, NAME, retries=0), **settings)(QUESTIONS[:1])
    assert [result.rationales for result in found] == [result.rationales for result in again]
    assert len({text for result in found for text in result.rationales}) > 4
    assert all(len(result.rationales) == 3 and all(0 < score <= 1 for score in result.scores) for result in found)
    assert len(chat[0].rationales) == 3


def test_the_command_asks_votes_and_goes_on(fake: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from calm_fast.cli import app

    rows = [{"question": text, "answer": i % 2} for i, text in enumerate(QUESTIONS)]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    server = fake(lambda request, before: many(request, request["n"]))
    command = ["ask", str(data), "--endpoint", server.url, "--model", "m", "--out", str(tmp_path / "out"), "--n", "5"]
    command += ["--equality", "exact"]
    for _ in range(2):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert "4 questions, 20 samples, majority right" in done.output
    assert len(server.requests) == 4  # the second call found all of them
    assert len(read_rows(tmp_path / "out" / "samples.jsonl")) == 4
    broken = fake(lambda request, before: 400)
    command[3] = broken.url
    command[7] = str(tmp_path / "other")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "takes the request, got status 400" in " ".join(done.output.split())
