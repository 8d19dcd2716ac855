"""What the server answers to requests that the openai client would not send, and to those it would not show."""

from __future__ import annotations

import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from served import NAME, running

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

CHAT, TEXT = "chat/completions", "completions"
ASKED: dict[str, Any] = {"model": NAME, "max_tokens": 6, "temperature": 0}


def send(url: str, path: str, body: Any, method: str = "POST") -> tuple[int, str]:
    """body: sent as it is if bytes, else as JSON."""
    parts = urlsplit(f"{url}/{path}")
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, parts.path, raw, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def text(url: str, **changes: Any) -> dict[str, Any]:
    status, body = send(url, TEXT, ASKED | {"prompt": "key 1 2 opens"} | changes)
    assert status == 200, body
    return json.loads(body)["choices"][0]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", TEXT, b"{nope", 400, "the body must be a JSON object, sent as application/json: Expecting property"),
        ("POST", TEXT, b"[]", 400, "the body must be a JSON object, sent as application/json: Input should be a valid"),
        ("POST", TEXT, b"", 400, "the body must be a JSON object"),
        ("POST", TEXT, b'{"prompt": "\xff"}', 400, "parsing the body"),
        ("GET", "nothing", b"", 404, "Not Found"),
        ("GET", TEXT, b"", 405, "Method Not Allowed"),
        ("POST", TEXT, b'{"prompt": "\\ud800"}', 400, "`prompt` must be valid Unicode, got half of a surrogate pair"),
        ("POST", TEXT, b'{"prompt": "a", "stop": "\\ud800"}', 400, "`stop` must be valid Unicode"),
        ("POST", TEXT, b'{"prompt": "a", "temperature": 1e-44}', 400, "`temperature` must be 0 or at least 1e-06"),
    ],
)
def test_every_error_has_the_form_of_the_protocol(
    url: str, method: str, path: str, body: bytes, status: int, message: str
) -> None:
    got, answer = send(url, path, body, method)
    error = json.loads(answer)["error"]
    assert got == status == error["code"] and message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_fault_of_the_server_is_one_too(url: str, composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise IndexError('index "9" out of range')  # as an embedding raises

    monkeypatch.setattr(composed[0], "generate", broken)
    status, answer = send(url, TEXT, ASKED | {"prompt": "key"})
    assert status == 500 and json.loads(answer)["error"]["message"] == 'index "9" out of range'
    _, answer = send(url, TEXT, ASKED | {"prompt": "key", "stream": True})
    (line,) = [line for line in answer.splitlines() if "error" in line]
    assert json.loads(line.removeprefix("data: "))["error"]["message"] == 'index "9" out of range'


@pytest.mark.integration(
    tool="serve", what="`chat_template_kwargs` that would cut the prompt, fields of a message", verdict="refused"
)
def test_nothing_that_changes_the_prompt_unseen_is_taken(url: str) -> None:
    turn = {"role": "user", "content": "key 1 2"}
    for options in (
        {"truncation": True, "max_length": 2}, {"chat_template": "x"}, {"tokenize": False}, {"tools": []},
        {"tokenizer_kwargs": {}}, {"padding": "max_length"}, {"continue_final_message": True}, {"messages": []},
    ):  # fmt: skip
        status, answer = send(url, CHAT, ASKED | {"messages": [turn], "chat_template_kwargs": options})
        assert status == 400 and "`chat_template_kwargs` must be variables of the chat template only" in answer
    for name in ("name", "reasoning_content"):
        status, answer = send(url, CHAT, ASKED | {"messages": [turn | {name: "bob"}]})
        assert status == 400 and f"`messages[0].{name}` is not a field that this server supports" in answer
    # an answer as clients send it back
    back = {"role": "assistant", "content": "door", "refusal": None, "tool_calls": None, "annotations": []}
    status, answer = send(url, CHAT, ASKED | {"messages": [turn, back, turn]})
    assert status == 200, answer


def test_a_stop_string_counts_in_the_answer_alone(url: str) -> None:
    plain = text(url)["text"]
    # the prompt ends with s, so that s and the first letter cross its end
    assert text(url, stop="s" + plain[0]) == {**text(url), "finish_reason": "length"}
    assert text(url, stop=plain[1:3])["text"] == plain[:1]


def test_log_probabilities_name_each_token(url: str, composed: Any) -> None:
    tokenizer = composed[1]
    found = text(url, logprobs=5, max_tokens=3)["logprobs"]
    assert "".join(found["tokens"]) == text(url, max_tokens=3)["text"]
    with torch.no_grad():
        first = composed[0](**tokenizer("key 1 2 opens", return_tensors="pt")).logits[0, -1].log_softmax(-1)
    for name, logprob in found["top_logprobs"][0].items():
        same = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == name]
        assert logprob == pytest.approx(float(first[same].max()), abs=1e-4)  # parts of characters share a text
    told = ASKED | {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 5}
    _, answer = send(url, CHAT, told)
    for token in json.loads(answer)["choices"][0]["logprobs"]["content"]:
        for one in (token, *token["top_logprobs"]):
            assert one["bytes"] == (None if "\ufffd" in one["token"] else list(one["token"].encode()))


def test_a_token_that_begins_a_word_keeps_its_space() -> None:
    from tiny import sentencepiece

    from calm_fast.serving.choices import TokenTexts

    tokenizer = sentencepiece()
    ids = tokenizer("key 1 opens door 2.", add_special_tokens=False)["input_ids"]
    texts = [TokenTexts(tokenizer)(token) for token in ids]
    assert "".join(texts).strip() == "key 1 opens door 2." and len(set(texts)) == len(set(ids))


def test_a_stream_ends_with_done(url: str) -> None:
    for path, prompt in ((TEXT, {"prompt": "key"}), (CHAT, {"messages": [{"role": "user", "content": "key"}]})):
        _, answer = send(url, path, ASKED | prompt | {"stream": True})
        *chunks, last = [line for line in answer.splitlines() if line]
        assert last == "data: [DONE]" and "usage" in json.loads(chunks[-1].removeprefix("data: "))


def test_what_cannot_be_served_is_refused_at_the_start(composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.cli.serving.server as server

    from calm_fast.serving import build_app

    model, tokenizer = composed
    model.connections[0].train()
    try:
        with pytest.raises(ValueError, match="serve: `model` must be in eval mode.* Call model.eval()"):
            build_app(model, tokenizer, NAME)
    finally:
        model.eval()
    plain = server.build_server

    def earlier(model_manager: Any, chat_handler: Any, completion_handler: Any, generation_state: Any) -> Any:
        return plain(model_manager, chat_handler, completion_handler, *[None] * 3, generation_state)

    monkeypatch.setattr(server, "build_server", earlier)  # 5.17 has one handler less than 5.24
    assert build_app(model, tokenizer, NAME)
    monkeypatch.setattr(server, "build_server", lambda model_manager: None)
    with pytest.raises(ImportError, match="serve: needs the server of transformers .*lacks chat_handler, completion_h"):
        build_app(model, tokenizer, NAME)


def test_an_augmenter_with_fewer_positions_limits_the_text(tmp_path: Path) -> None:
    from served import trained
    from tiny import byte_level, save_model
    from transformers import GPT2Config, GPT2LMHeadModel

    from calm_fast import compose

    tokenizer = byte_level(chat=True)
    anchor = save_model(tmp_path / "anchor", tokenizer, 0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=len(tokenizer), n_positions=12,
                        bos_token_id=1, eos_token_id=1)  # fmt: skip
    model = trained(compose(str(anchor), GPT2LMHeadModel(config), connections="uniform:2", same_ids=True))
    with running(model, tokenizer) as url:
        status, answer = send(url, TEXT, ASKED | {"prompt": "k" * 7})
        assert status == 400 and "must be at most 12, the model's, got 7 and 6 new ones" in answer
        assert send(url, TEXT, ASKED | {"prompt": "k" * 6})[0] == 200
        assert send(url, TEXT, {"model": NAME, "temperature": 0, "prompt": "k" * 6})[0] == 200  # as many as fit


@pytest.mark.integration(tool="serve", what="SIGTERM: requests that came before it get their answers", verdict="works")
def test_a_server_that_is_told_to_end_answers_first(composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, entered, answers = composed[0], threading.Event(), list[tuple[int, str]]()

    def slow(*args: Any, _plain: Any = model.anchor.forward, **kwargs: Any) -> Any:
        entered.set()
        time.sleep(0.02)
        return _plain(*args, **kwargs)

    monkeypatch.setattr(model.anchor, "forward", slow)

    def ask(url: str, more: dict[str, Any]) -> None:
        answers.append(send(url, TEXT, ASKED | {"prompt": "key", "max_tokens": 40} | more))

    with running(*composed) as url:
        threads = [threading.Thread(target=ask, args=(url, more)) for more in ({}, {"stream": True})]
        for thread in threads:
            thread.start()
            assert entered.wait(60)
            entered.clear()
    # the server was told to end, as uvicorn does at SIGTERM, while one request ran and perhaps one waited
    for thread in threads:
        thread.join(60)
    assert [status for status, _ in answers] == [200, 200]
    assert any(body.endswith("data: [DONE]\n\n") for _, body in answers)
