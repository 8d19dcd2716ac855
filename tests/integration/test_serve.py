"""The server, asked with the real client over loopback."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from served import NAME, composition, running

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

PROMPT = "key 1 2 opens"
CHAT = [{"role": "system", "content": "doors"}, {"role": "user", "content": [{"type": "text", "text": PROMPT}]}]


@pytest.fixture
def client(url: str) -> Any:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


def ask(client: Any, **changes: Any) -> Any:
    settings = {"model": NAME, "prompt": PROMPT, "max_tokens": 8, "temperature": 0.0} | changes
    return client.completions.create(**settings)


def chat(client: Any, **changes: Any) -> Any:
    settings = {"model": NAME, "messages": CHAT, "max_completion_tokens": 8, "temperature": 0.0} | changes
    return client.chat.completions.create(**settings)


def plain(composed: Any, prompt: str, count: int = 8) -> str:
    """What generate() writes, without a server."""
    model, tokenizer = composed
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.integration(tool="serve", what="completions and chats, whole and streamed", verdict="works")
def test_an_answer_is_what_generate_writes(client: Any, composed: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    expected = plain(composed, PROMPT)
    found = ask(client)
    assert found.choices[0].text == expected and found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 8
    assert "".join(chunk.choices[0].text for chunk in ask(client, stream=True)) == expected
    turns = [CHAT[0], {"role": "user", "content": PROMPT}]
    expected = plain(composed, composed[1].apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    assert chat(client).choices[0].message.content == expected
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].usage.completion_tokens == 8 and chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.integration(tool="serve", what="requests at the same time, answered one after the other", verdict="works")
def test_requests_at_the_same_time_do_not_touch_each_other(client: Any, composed: Any) -> None:
    prompts = [f"key {i} {i} opens" for i in range(6)]
    sampled = {"temperature": 1.3, "seed": 5, "max_tokens": 6}
    alone = ask(client, **sampled).choices[0].text
    assert alone == ask(client, **sampled).choices[0].text != ask(client, **(sampled | {"seed": 6})).choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in ask(client, stream=True, **sampled))
    assert streamed == alone
    with ThreadPoolExecutor(12) as pool:
        greedy = [pool.submit(ask, client, prompt=prompt) for prompt in prompts]
        seeded = [pool.submit(ask, client, **sampled) for _ in range(6)]
        assert [job.result().choices[0].text for job in greedy] == [plain(composed, prompt) for prompt in prompts]
        assert {job.result().choices[0].text for job in seeded} == {alone}


@pytest.mark.integration(tool="serve", what="`n` samples in one batch, `logprobs`, `stop`", verdict="works")
def test_samples_and_their_log_probabilities(client: Any, composed: Any) -> None:
    model, tokenizer = composed
    settings = {"n": 5, "temperature": 1.0, "seed": 3}
    found = ask(client, logprobs=2, **settings)
    texts = [choice.text for choice in found.choices]
    assert len(texts) == 5 and len(set(texts)) > 1 and [choice.index for choice in found.choices] == list(range(5))
    assert texts == [choice.text for choice in ask(client, **settings).choices]
    # again by generate with the same seed, whose ids give the log-probabilities
    inputs = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(3)
    ids = model.generate(
        **inputs, max_new_tokens=8, do_sample=True, temperature=1.0, top_k=0, num_return_sequences=5, pad_token_id=0
    )
    length = inputs["input_ids"].shape[1]
    assert texts == tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
    with torch.no_grad():
        logprobs = model(ids).logits[:, length - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(2, ids[:, length:, None])[..., 0]
    for row, choice in zip(expected, found.choices, strict=True):  # one that draws the end token is shorter
        got = choice.logprobs.token_logprobs
        assert len(got) == 8 or choice.finish_reason == "stop"
        torch.testing.assert_close(torch.tensor(got), row[: len(got)], atol=1e-4, rtol=1e-4)
    best = found.choices[0].logprobs.top_logprobs[0]
    assert max(best.values()) == pytest.approx(float(logprobs[0, 0].max()), abs=1e-4)
    told = chat(client, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert len(told) == 8 and all(token.logprob <= token.top_logprobs[0].logprob <= 0 for token in told)

    text = ask(client, max_tokens=8).choices[0].text
    stop = next(letter for letter in text if letter != "\ufffd" and not text.startswith(letter))
    cut = ask(client, stop=stop).choices[0]
    assert cut.text == text.partition(stop)[0] and cut.finish_reason == "stop"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "hot"}, "`temperature` must be a number from 0 to 2, got 'hot'"),
    ({"temperature": -1}, "`temperature` must be a number from 0 to 2"),
    ({"max_tokens": 0}, "`max_tokens` must be an integer of at least 1"),
    ({"max_tokens": 10**6}, "must be at most 2048, the model's"),
    ({"prompt": ""}, "the prompt must have at least one token"),
    ({"prompt": ["a", "b"]}, "`prompt` must be a string"),
    ({"n": 2}, "`n` must be 1 unless tokens are sampled"),
    ({"n": 2, "temperature": 1, "stream": True}, "`n` is not supported with `stream`"),
    ({"stop": "x", "stream": True}, "`stop` is not supported with `stream`"),
    ({"presence_penalty": 0.5}, "`presence_penalty` must be left out"),
    ({"frequency_penalty": 0.5}, "`frequency_penalty` must be left out"),
    ({"best_of": 3}, "`best_of` is not a field"),
    ({"echo": True}, "`echo` must be left out"),
    ({"suffix": "x"}, "`suffix` must be left out"),
    ({"logprobs": 9}, "`logprobs` must be an integer of at least 0 and at most 5"),
    ({"model": "another"}, "requested 'another'"),
    ({"extra_body": {"generation_config": "{}"}}, "`generation_config` is not a field"),
]


@pytest.mark.integration(
    tool="serve", what="fields that would be ignored: penalties, tools, `suffix`, `best_of`",
    verdict="refused",
)  # fmt: skip
def test_a_request_that_would_not_be_honoured_is_refused(client: Any) -> None:
    for changes, message in BAD:
        with pytest.raises(openai.BadRequestError) as problem:
            ask(client, **changes)
        assert message in str(problem.value), changes
    for changes, message in (
        ({"messages": []}, "`messages` must be a list of at least one message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "'text'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "`tools` must be left out"),
        ({"response_format": {"type": "json_object"}}, "`response_format` must be left out"),
    ):
        with pytest.raises(openai.BadRequestError) as problem:
            chat(client, **changes)
        assert message in str(problem.value), changes
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "logit_bias": {}, "n": 1}
    assert ask(client, **neutral).choices[0].text == ask(client).choices[0].text
    for path in ("/reset", "/load_model"):
        with pytest.raises(openai.NotFoundError):
            client.post("../" + path.strip("/"), cast_to=object, body={"model": "x"})


@pytest.mark.integration(tool="serve", what="a client that goes away ends its generation", verdict="works")
def test_a_client_that_goes_frees_the_model(url: str, composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps, entered = composed[0], [0], threading.Event()

    def counted(*args: Any, _plain: Any = model.anchor.forward, **kwargs: Any) -> Any:
        steps[0] += 1
        entered.set()
        time.sleep(0.01)
        return _plain(*args, **kwargs)

    monkeypatch.setattr(model.anchor, "forward", counted)
    hasty = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=1.0)
    with pytest.raises(openai.APITimeoutError):
        ask(hasty, max_tokens=1500, n=2, temperature=1)
    assert entered.is_set()
    patient = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    ask(patient, max_tokens=1)  # waits until the model is free
    assert steps[0] < 1400
    before = steps[0]
    stream = ask(patient, max_tokens=1500, stream=True)
    next(iter(stream))
    stream.close()
    ask(patient, max_tokens=1)
    assert steps[0] - before < 1400


def test_an_error_in_a_stream_is_an_error_for_the_client(url: str, composed: Any, monkeypatch: Any) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError('it "broke"\nhere')

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    with monkeypatch.context() as patch:
        patch.setattr(composed[0], "generate", broken)
        with pytest.raises(openai.APIError) as problem:
            list(ask(client, stream=True))
        assert 'it "broke"\nhere' in str(problem.value)
        with pytest.raises(openai.InternalServerError):
            ask(client)
    assert ask(client).choices[0].finish_reason == "length"  # the server lives


@pytest.mark.integration(tool="serve", what="an augmenter with another tokenizer", verdict="works")
def test_an_augmenter_with_another_tokenizer(tmp_path: Any) -> None:
    model, tokenizer = composition(tmp_path, other=True)
    assert model.aligned
    with running(model, tokenizer) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        expected = plain((model, tokenizer), PROMPT)
        assert ask(client).choices[0].text == expected
        assert "".join(chunk.choices[0].text for chunk in ask(client, stream=True)) == expected
        assert len({choice.text for choice in ask(client, n=3, temperature=1, seed=1).choices}) > 1
