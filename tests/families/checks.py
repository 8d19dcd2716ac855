"""What is checked of every family in its roles, with dual LoRA, when it is scored and when it is sampled.

A check takes a model and raises if it is wrong. Where it also fails for the plain model, the fault is transformers'.
`inputs` knows how models of each kind are called, so that one check serves all of them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from shrink import LAYERS, VOCAB, WIDTH, kind_of, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calm_fast import SelfConsistency, add_dual_lora, remove_dual_lora
from calm_fast.consistency import score_sequences
from calm_fast.hf import ComposedForCausalLM, ComposedForSeq2SeqLM, compose
from calm_fast.hf.dual_lora import dual_lora_layers

STEPS, PROMPT = 4, 5
# roles of every kind of family: role -> what `bidirectional` is when the family is the augmenter, or None
ROLES: dict[str, dict[str, str | None]] = {
    "causal": {"anchor": None, "augmenter": None},
    "seq2seq": {"anchor": None, "encoder": "prompt"},
    "encoder": {"prompt": "prompt", "reencode": "reencode"},
}


def prompts() -> torch.Tensor:
    """Return (2, 7) token ids without special ones."""
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))


def sources() -> torch.Tensor:
    """Return (2, 6) token ids without special ones, which an encoder-decoder reads."""
    return torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(4))


@functools.cache
def _llama() -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids, initializer_range=0.3)).eval()


def llama() -> Any:
    """Return the model that stands on the other side of every composition."""
    return copy.deepcopy(_llama())


def parts(model: Any, role: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return (anchor, augmenter) for `model` in a role."""
    other = llama().to(dtype)
    return (model, other) if role == "anchor" else (other, model)


def untrained(model: Any, role: str, dtype: torch.dtype = torch.float32) -> Any:
    """Compose `model` in a role with a Llama."""
    mode = next((modes[role] for modes in ROLES.values() if role in modes), None)
    more = {"vocab_size": VOCAB, "same_ids": True, "bidirectional": mode}
    return compose(*parts(model, role, dtype), "uniform:2", **more)  # type: ignore[arg-type]  # of several types


def composed(model: Any, role: str, dtype: torch.dtype = torch.float32) -> Any:
    """Compose `model` in a role with a Llama, with random weights."""
    result = untrained(model, role, dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in result.connections.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if p.ndim == 1 else noise / p.shape[-1] ** 0.5)
    return result


def is_composed(model: Any) -> bool:
    return isinstance(model, (ComposedForCausalLM, ComposedForSeq2SeqLM))


def inputs(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, prompt: int = PROMPT) -> dict[str, Any]:
    """Return the arguments of a forward without a cache over ids (B, M), which an encoder-decoder's decoder reads."""
    if not model.can_generate():  # an encoder
        return {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    given: dict[str, Any] = {"use_cache": False}
    if model.config.is_encoder_decoder:
        return given | {"input_ids": sources()[: len(ids)], "decoder_input_ids": ids}
    given["input_ids"] = ids
    if mask is not None:
        given["attention_mask"] = mask
        if "position_ids" in inspect.signature(type(model).forward).parameters:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    encodes = is_composed(model) and any(mode is not None for mode in model.config.bidirectional)
    return given | ({"prompt_length": prompt} if encodes else {})


def states(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """Return the logits of a forward, or an encoder's last states."""
    output = model(**given)
    return output.logits if "logits" in output else output[0]


def close(one: torch.Tensor, two: torch.Tensor, steps: float = 2e-4) -> None:
    """Raise AssertionError unless two tensors are equal up to the rounding of float32 through a few layers."""
    if one.shape != two.shape or not one.isfinite().all():
        raise AssertionError(f"shapes {tuple(one.shape)} and {tuple(two.shape)}, or not finite")
    moved = (one - two).abs().max().item()
    if not moved <= steps * max(1.0, two.abs().max().item()):
        raise AssertionError(f"differs by {moved:.3g}")


@torch.no_grad()
def runs(model: Any) -> None:
    states(model, inputs(model, prompts()))


@torch.no_grad()
def no_leak(model: Any) -> None:
    if not model.can_generate():
        return  # an encoder reads the future by design
    ids = prompts()
    other = ids.clone()
    other[:, -1] = 3 + (ids[:, -1] - 2) % (VOCAB - 3)
    close(states(model, inputs(model, ids))[:, :-1], states(model, inputs(model, other))[:, :-1])


@torch.no_grad()
def padding(model: Any) -> None:
    """Compare a padded row with the row alone: pads on the left of a text, on the right of a source."""
    ids = prompts()
    mask = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        source, real = sources(), torch.ones_like(sources())
        real[0, 4:] = 0
        given = {"decoder_input_ids": ids, "use_cache": False}
        padded = model(input_ids=source * real, attention_mask=real, **given).logits[:1]
        given["decoder_input_ids"] = ids[:1]
        close(padded, model(input_ids=source[:1, :4], **given).logits)
    elif not model.can_generate():
        mask[0, 4:] = 0
        close(states(model, inputs(model, ids * mask, mask))[:1, :4], states(model, inputs(model, ids[:1, :4])))
    else:
        mask[0, :3] = 0
        padded = states(model, inputs(model, ids * mask, mask))[:1, 3:]
        close(padded, states(model, inputs(model, ids[:1, 3:], prompt=PROMPT - 3)))


def generates(**how: Any) -> Callable[[Any], None]:
    """Return the check that generation with a cache gives the tokens of recomputation."""

    def check(model: Any) -> None:
        if not model.can_generate():
            return
        plain = {k: v for k, v in how.items() if k != "cache_implementation"}
        common = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = sources() if model.config.is_encoder_decoder else prompts()
        common["attention_mask"] = torch.ones_like(ids)
        cached = model.generate(ids, use_cache=True, **common, **how)
        if not torch.equal(cached, model.generate(ids, use_cache=False, **common, **plain)):
            raise AssertionError("cached and recomputed tokens differ")

    return check


def learns(model: Any) -> torch.Tensor:
    """Return the loss of a text."""
    given = inputs(model, prompts())
    given.pop("decoder_input_ids", None)
    return model(**given, labels=prompts()).loss


def trains(model: Any) -> None:
    if not model.can_generate():
        return
    if not is_composed(model):
        learns(model).backward()
        return
    learns(model.train()).backward()
    dead = [name for name, p in model.connections.named_parameters() if p.grad is None or not p.grad.any()]
    if dead:
        raise AssertionError(f"no gradient for {dead[:2]}")


def checkpoints(model: Any) -> None:
    if not is_composed(model):
        model.gradient_checkpointing_enable()
        learns(model.train()).backward()
        return
    learns(model.train()).backward()
    grads = [p.grad.clone() for p in model.connections.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    learns(model).backward()
    for one, p in zip(grads, model.connections.parameters(), strict=True):
        close(p.grad, one)


@torch.no_grad()
def saves(model: Any) -> None:
    given = {"anchor": model.anchor, "augmenters": model.whole} if is_composed(model) else {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, **given).eval()
    close(states(loaded, inputs(loaded, prompts())), states(model, inputs(model, prompts())), 1e-6)


ON_MODELS: dict[str, Callable[[Any], None]] = {
    "no leak": no_leak,
    "padding": padding,
    "greedy": generates(),
    "beams": generates(num_beams=2),
    "static cache": generates(cache_implementation="static"),
    "training": trains,
    "checkpointing": checkpoints,
    "save, load": saves,
}


@torch.no_grad()
def identity(model: Any, role: str) -> None:
    made, ids = untrained(model, role), prompts()
    if not torch.equal(states(made, inputs(made, ids)), states(made.anchor, inputs(made.anchor, ids))):
        raise AssertionError("the untrained composition is not its anchor")


@torch.no_grad()
def bfloat16(model: Any) -> None:
    if not states(model, inputs(model, prompts())).isfinite().all():
        raise AssertionError("not finite")


def in_role(family: str, role: str, name: str) -> None:
    """Run check `name` on a composition with the family in `role`."""
    model = tiny_model(family)
    if name == "compose":
        untrained(model, role)
    elif name == "identity":
        identity(model, role)
    elif name == "bf16":
        bfloat16(composed(model.bfloat16(), role, torch.bfloat16))
    else:
        made = composed(model, role)
        made.whole = [llama()] if role == "anchor" else [model]
        ON_MODELS[name](made)


def plain(family: str, name: str) -> None:
    """Run check `name` on the family's plain model."""
    model = tiny_model(family)
    if name == "bf16":
        bfloat16(model.bfloat16())
    else:
        (ON_MODELS | {"SelfConsistency": chooses}).get(name, runs)(model)


def dual_lora(family: str) -> None:
    """Add dual LoRA with the default targets, train a step, and remove it.

    Every layer that runs must get a gradient. Some families have layers that a text alone does not reach, such as the
    cross-attention of BART's decoder.
    """
    model, ids = tiny_model(family), prompts()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = states(model, inputs(model, ids))
    add_dual_lora(model, rank=2, gate_dim=4, value_dim=4)
    layers, ran = dual_lora_layers(model), set()
    for path, layer in layers.items():
        layer.register_forward_hook(lambda *_, path=path: ran.add(path))
    logits = states(model, inputs(model, ids))
    close(logits.detach(), before)
    logits.square().mean().backward()
    dead = [path for path, layer in layers.items() if path in ran and layer.lora_a_pos.grad is None]
    if dead or not ran:
        raise AssertionError(f"no gradient for {dead[:2]}")
    remove_dual_lora(model)
    if any(not torch.equal(state[name], tensor) for name, tensor in model.state_dict().items()):
        raise AssertionError("removal does not restore the model")


@torch.no_grad()
def scores(family: str) -> None:
    """Compare score_sequences with the log-softmax of the plain model's logits, one row at a time."""
    model, ids = tiny_model(family), prompts()
    rows = ids.tolist()
    found = score_sequences(model, [rows[0][:3]], [[rows[0][3:], rows[1][3:6]]], progress=False)[0].sum
    for value, completion in zip(found.tolist(), (rows[0][3:], rows[1][3:6]), strict=True):
        text = torch.tensor([rows[0][:3] + completion])
        logprobs = model(text, use_cache=False).logits[0, 2:-1].double().log_softmax(-1)
        expected = logprobs.gather(1, text[0, 3:, None]).sum().item()
        if abs(value - expected) > 1e-3 * max(1.0, abs(expected)):
            raise AssertionError(f"{value:.5f} instead of {expected:.5f}")


def word(token: int) -> str:
    """Return the text of a token; none is the beginning of another, because special tokens are cut out of a text."""
    return f"w{token:02d}"


@functools.cache
def words() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token i is the word `word(i)`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word(i): i for i in range(VOCAB)}, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=word(0), eos_token=word(2))


def greedy_choice(model: Any, row: list[int]) -> list[int]:
    """Return the most likely next tokens after `row`, each from a forward over all tokens before it."""
    text = list(row)
    for _ in range(STEPS):
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        if text[-1] == model.generation_config.eos_token_id:
            break
    return text[len(row) :]


def chooses(model: Any) -> None:
    """Compare the plain model's own greedy generation, one row at a time, with `greedy_choice`."""
    how = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    for row in (prompts()[0].tolist(), prompts()[1, 3:].tolist()):
        text = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), **how)
        if text[0, len(row) :].tolist() != greedy_choice(model, row):
            raise AssertionError("generate does not choose the most likely tokens")


@torch.no_grad()
def samples(family: str) -> None:
    """Compare SelfConsistency at temperature 0 over two prompts of different lengths with greedy choice, row by row."""
    model, ids = tiny_model(family), prompts()
    rows = [ids[0].tolist(), ids[1, 3:].tolist()]
    questions = [" ".join(map(word, row)) for row in rows]
    how = {"prompt": "{question}", "equality": "exact", "temperature": 0.0, "max_new_tokens": STEPS, "progress": False}
    results = SelfConsistency(model, words(), n=1, rule="count", **how)(questions)  # type: ignore[arg-type]
    end = model.generation_config.eos_token_id
    for row, result in zip(rows, results, strict=True):
        found = result.rationales[0].split()
        special = (0, 2, end)  # a rationale is a text without special tokens: padding and end, see words()
        expected = [word(token) for token in greedy_choice(model, row) if token not in special]
        if found != expected:
            raise AssertionError(f"{found} instead of {expected}")


IN_ROLES = ("compose", "identity", *ON_MODELS, "bf16")
ALONE: dict[str, Callable[[str], None]] = {
    "dual LoRA": dual_lora,
    "score_sequences": scores,
    "SelfConsistency": samples,
}


def checks_of(family: str) -> list[str]:
    """Return the checks of a family in order: "role: name", or a name alone."""
    kind = kind_of(family)[0]
    alone = {"causal": list(ALONE), "seq2seq": ["dual LoRA"], "encoder": []}[kind]
    return [f"{role}: {name}" for role in ROLES[kind] for name in IN_ROLES] + alone
