"""lm-evaluation-harness scores our models as `score_sequences` does, through its command line and in any batch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hf"))

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from ragged import ROUNDINGS  # noqa: E402
from texts import aligned_model, model_of, tokenizer  # noqa: E402

from calm_fast import add_dual_lora, save_dual_lora, score_sequences  # noqa: E402
from calm_fast.lm_eval import CalmFastLM  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lm_eval_tiny.py"
QUESTIONS = [
    ("the cat sat on", [" the mat", " the dog and the cat ran after", " a"]),
    ("one two three", [" four", " five six seven eight nine", " the"]),
    ("der Hund", [" läuft über die Straße", " und", " x + 1"]),
]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def bound(model: Any, tokens: int) -> float:
    """Return how far two sums of `tokens` log-probabilities may lie apart: each has a logit and a log-sum-exp."""
    with torch.no_grad():
        largest = model(torch.arange(3, 40)[None]).logits.abs().max().item()
    return 2 * tokens * ROUNDINGS * 2**-24 * max(1.0, largest)


def ours(model: Any) -> tuple[list[float], int]:
    """Return score_sequences' sums for QUESTIONS, and the tokens of the longest continuation."""
    prompts, rows = [q for q, _ in QUESTIONS], [c for _, c in QUESTIONS]
    found = score_sequences(model, prompts, rows, tokenizer=tokenizer("bytes"))
    return [x for s in found for x in s.sum.tolist()], max(int(s.tokens.max()) for s in found)


def theirs(lm: HFLM) -> list[float]:
    pairs = [(question, choice) for question, choices in QUESTIONS for choice in choices]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def apart(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def example() -> Any:
    spec = importlib.util.spec_from_file_location("lm_eval_tiny", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.integration(
    tool="lm-eval", what="a composition through the command line, a local task, max length", verdict="works"
)
def test_the_command_line_gives_our_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny = example()
    rows = tiny.write_task(tmp_path)
    tiny.write_models(tmp_path)
    accuracy, scores = tiny.evaluate(tmp_path, "composition")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "composition")
    texts = [[f" {choice}" for choice in row["choices"]] for row in rows]
    own = score_sequences(model, [row["text"] for row in rows], texts, tokenizer=tiny.tokenizer())
    assert max(apart(a, b.sum.tolist()) for a, b in zip(scores, own, strict=True)) <= bound(model, 2)
    right = [int(torch.tensor(score).argmax()) == row["answer"] for score, row in zip(scores, rows, strict=True)]
    assert accuracy == pytest.approx(sum(right) / len(rows), abs=1e-12)
    assert CalmFastLM(pretrained=str(tmp_path / "composition"), device="cpu").max_length == 48  # the anchor's


@pytest.mark.integration(tool="lm-eval", what='a composition as model "hf", several batch sizes', verdict="works")
@pytest.mark.parametrize("kind", [HFLM, CalmFastLM])
def test_any_batch_gives_our_scores(kind: type[HFLM]) -> None:
    model = aligned_model(("llama", "bytes"), ("llama", "bytes")).eval()  # one tokenizer: no aligner
    assert not model.aligned
    own, tokens = ours(model)
    for size in (1, 4):
        lm = kind(pretrained=model, tokenizer=tokenizer("bytes"), batch_size=size)
        assert apart(theirs(lm), own) <= bound(model, tokens)


@pytest.mark.integration(
    tool="lm-eval", what='two tokenizers, as model "calm_fast", several batch sizes', verdict="works"
)
def test_two_tokenizers_in_any_batch() -> None:
    model = aligned_model().eval()
    own, tokens = ours(model)
    for size in (1, 4):
        lm = CalmFastLM(pretrained=model, tokenizer=tokenizer("bytes"), batch_size=size)
        assert apart(theirs(lm), own) <= bound(model, tokens)
    plain = HFLM(pretrained=model, tokenizer=tokenizer("bytes"), batch_size=4)
    assert apart(theirs(plain), own) > 100 * bound(model, tokens)  # why "calm_fast" is there
    short = CalmFastLM(pretrained=model, tokenizer=tokenizer("bytes"), batch_size=3, max_length=4)
    cut = short._loglikelihood_tokens([(None, [5, 6, 7, 8, 9], [10, 11])])
    alone = short._loglikelihood_tokens([(None, [7, 8, 9], [10, 11])])
    assert cut == alone  # the last max_length + 1 tokens, and the last of them is not read


@pytest.mark.integration(tool="lm-eval", what="two tokenizers, generate_until", verdict="works")
def test_two_tokenizers_generate() -> None:
    model, tok = aligned_model().eval(), tokenizer("bytes")
    lm = CalmFastLM(pretrained=model, tokenizer=tok, batch_size=2)
    asked = [(text, {"until": ["no such text"], "max_gen_toks": 5}) for text in ("the cat sat on the mat", "one two")]
    got = lm.generate_until(
        [Instance("generate_until", {}, pair, i) for i, pair in enumerate(asked)], disable_tqdm=True
    )
    for (text, _), answer in zip(asked, got, strict=True):
        batch = tok([text], return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=5, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert answer == tok.decode(ids, skip_special_tokens=True)


@pytest.mark.integration(tool="lm-eval", what='two tokenizers, batch_size "auto"', verdict="refused")
def test_batch_size_auto_over_two_tokenizers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`batch_size` must be a number.*reads text of its own, got 'auto'"):
        CalmFastLM(pretrained=aligned_model(), tokenizer=tokenizer("bytes"), batch_size="auto")


@pytest.mark.integration(tool="lm-eval", what="a dual-LoRA model (`dual_lora=FOLDER`)", verdict="works")
def test_a_dual_lora_model(tmp_path: Path) -> None:
    base = model_of("llama", "bytes", 0)
    base.save_pretrained(tmp_path / "base")
    tokenizer("bytes").save_pretrained(tmp_path / "base")
    model = add_dual_lora(base, rank=4).eval()
    for name, parameter in model.named_parameters():
        if "lora" in name or "value" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_dual_lora(model, tmp_path / "dual")
    own, tokens = ours(model)
    lm = CalmFastLM(
        pretrained=str(tmp_path / "base"), dual_lora=str(tmp_path / "dual"), dtype="float32", device="cpu", batch_size=4
    )
    assert apart(theirs(lm), own) <= bound(model, tokens)
    without = CalmFastLM(pretrained=str(tmp_path / "base"), dtype="float32", device="cpu", batch_size=4)
    assert apart(theirs(without), own) > 100 * bound(model, tokens)
    with pytest.raises(ValueError, match="`dual_lora` must be None with a loaded model"):
        CalmFastLM(pretrained=model, dual_lora=str(tmp_path / "dual"))


@pytest.mark.integration(tool="lm-eval", what="two tokenizers, loglikelihood_rolling", verdict="works")
def test_two_tokenizers_score_whole_texts() -> None:
    model, tok = aligned_model().eval(), tokenizer("bytes")
    texts = ["the cat sat on the mat", "one two", "der Hund läuft"]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    ids = [tok(text, add_special_tokens=False)["input_ids"] for text in texts]
    for size in (1, 3):
        lm = CalmFastLM(pretrained=model, tokenizer=tok, batch_size=size)
        own = score_sequences(model, [[lm.prefix_token_id]] * len(texts), [[row] for row in ids], tokenizer=tok)
        got = lm.loglikelihood_rolling(requests, disable_tqdm=True)
        assert apart(got, [float(one.sum) for one in own]) <= bound(model, max(map(len, ids)))


def test_no_text_is_longer_than_an_augmenters_positions() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from calm_fast import compose

    tok = tokenizer("bytes")
    anchor = model_of("llama", "bytes", 0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=len(tok), n_positions=12)
    model = compose(anchor, GPT2LMHeadModel(config), [(1, 1)], same_ids=True).eval()
    lm = CalmFastLM(pretrained=model, tokenizer=tok, batch_size=2)
    assert lm.max_length == 12 < anchor.config.max_position_embeddings
    long = ("the cat sat on the mat and the cat sat on the mat", " again")
    cut = lm.loglikelihood([Instance("loglikelihood", {}, long, 0)], disable_tqdm=True)
    assert cut[0][0] < 0  # an embedding raises IndexError for more tokens
    assert CalmFastLM(pretrained=model, tokenizer=tok, max_length=7).max_length == 7
