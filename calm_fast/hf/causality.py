"""Trial runs that show whether a part of a composition reads future tokens, or other documents of a packed row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from calm_fast.core.checks import bad_value
from calm_fast.core.threads import in_this_thread
from calm_fast.hf.inputs import Signature, Tokens, part_inputs
from calm_fast.hf.layers import headless_path, submodule

if TYPE_CHECKING:
    from calm_fast.hf.composed import ComposedForCausalLM

TOKENS = 4  # of a probe's rows: three that are the same, and the last one
PAIRS = 3  # of last tokens, tried until one pair differs

# settings that are known to make a model read the future: name -> the values that do
_SETTINGS = {"is_decoder": (False,), "use_bidirectional_attention": (True, "all"), "is_causal": (False,)}


class Part(NamedTuple):
    """A part of a composition. argument, label: its names in errors.

    called: the module that a composed forward calls: the anchor itself, which may build masks of its own, or an
    augmenter's body. body: the headless module inside it, whose states are compared.
    """

    argument: str
    label: str
    model: PreTrainedModel
    called: nn.Module
    body: nn.Module
    signature: Signature
    depth: int


def parts(composed: ComposedForCausalLM) -> list[Part]:
    """Return the anchor and every augmenter's truncated view."""
    anchor, path = composed.anchor, composed.config.anchor_layers
    assert path is not None  # found at construction
    body = submodule(anchor, headless_path(anchor, path))
    depth = len(anchor.get_submodule(path))  # type: ignore[arg-type]  # a ModuleList
    found = [Part("anchor", type(anchor).__name__, anchor, anchor, body, composed.signatures[0], depth)]
    for index, depth in enumerate(composed.depths):
        model, signature = composed._augmenter(index), composed.signatures[index + 1]
        label = f"augmenter {index} ({type(model).__name__})"
        body = submodule(model, composed.headless[index])
        found.append(Part("augmenters", label, model, body, body, signature, depth))
    return found


def check_parts_causal(composed: ComposedForCausalLM, where: str, *, defer: bool) -> None:
    """Raise ValueError for a part of `composed` that reads future tokens.

    Each part runs once on two rows of four tokens that differ in the last one. The states before it must be equal bit
    for bit. If they are not (the rounding of a mixture of experts depends on all tokens), the gradient of these states
    by the last token's embedding must be exactly zero.

    where: the function that errors name. defer: leave a part that cannot run here (no weights yet, kernels of another
    device) to the first forward, which raises what it raises.
    """
    unproven = False
    for part in parts(composed):
        if part.signature.device(part.model).type == "meta":  # no values yet: the forward only infers shapes
            unproven = True
            continue
        try:
            moved = _last_token_moves_earlier_states(part)
        except Exception:
            if not defer:
                raise
            unproven = True
            continue
        if moved:
            expected = "models that read no future token" if part.argument == "augmenters" else "a causal model"
            got = f"{part.label}, in which the last token changes the states before it{_reason(part.model.config)}"
            raise bad_value(where, part.argument, expected, got)
    composed.unproven = unproven


def check_parts_separate(composed: ComposedForCausalLM, where: str) -> None:
    """Raise ValueError for a part that does not separate the documents of a packed row, whose positions restart.

    Each part runs once on two rows of two documents. The first documents differ, and the states of the second ones must
    be equal up to rounding. where: the function that errors name.
    """
    for part in parts(composed):
        if not _separates_documents(part):
            expected = f"positions that do not restart, because {part.label} does not separate documents by them"
            got = "rows of several documents. Give each document a row of its own, with padding"
            raise bad_value(where, "position_ids", expected, got)
    composed.separates = True


@torch.no_grad()
def _separates_documents(part: Part) -> bool:
    if not part.signature.position_ids:
        return False
    usable = _usable_ids(part.model)
    first, other = (torch.tensor([usable[(i + start) % len(usable)] for i in range(TOKENS)]) for start in (0, TOKENS))
    ids = torch.stack([torch.cat([first, first]), torch.cat([other, first])])
    positions = torch.arange(TOKENS).repeat(2).expand(2, -1)
    device = part.signature.device(part.model)
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), torch.compiler.set_stance("force_eager"):
        tokens = Tokens(input_ids=ids, attention_mask=None, position_ids=positions)
        states = _states(part, part_inputs(part.model, part.signature, tokens, None, 0))
    if states is None:
        return True  # not (batch, tokens, width): the forward refuses to connect such a layer
    one, two = states[:, TOKENS:].float()
    steps = 4 * math.sqrt(part.depth + 1) if states.dtype.itemsize < 4 else 1000.0
    return bool((one - two).abs().max() <= steps * torch.finfo(states.dtype).eps * one.abs().max())


def _reason(config: PreTrainedConfig) -> str:
    text = config.get_text_config(decoder=True)
    for name, values in _SETTINGS.items():
        value = getattr(text, name, None)
        if any(value is v or value == v for v in values if type(v) is type(value)):
            other = next(v for v in (True, False) if v is not value) if isinstance(value, bool) else None
            return f" (its config says {name}={value!r}). Load it with {name}={other!r}, or use a causal model"
    return ". Use a causal language model; if this is one, pass check_causal=False"


@torch.no_grad()
def _last_token_moves_earlier_states(part: Part) -> bool:
    device = part.signature.device(part.model)
    forked = [device] if device.type == "cuda" else []
    # eager: a compiled part would be compiled for the probe's shape
    with torch.random.fork_rng(devices=forked), torch.compiler.set_stance("force_eager"):
        for ids in _probes(part.model):
            tokens = Tokens(input_ids=ids, attention_mask=None, position_ids=None)
            inputs = part_inputs(part.model, part.signature, tokens, None, 0)
            states = _states(part, inputs)
            if states is None:
                return False  # not (batch, tokens, width): the first forward refuses to connect such a layer
            same, last = states[:, :-1], states[:, -1]
            if not _differ(last[0], last[1]):
                continue  # two tokens that the model does not tell apart
            return _differ(same[0], same[1]) and _beyond_rounding(part, inputs, same)
    return False


def _probes(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Yield ids (2, TOKENS): rows that differ in the last token, without special tokens if there are others."""
    usable = _usable_ids(model)
    first = [usable[i % len(usable)] for i in range(1, TOKENS)]
    for i in range(min(PAIRS, len(usable) // 2)):
        yield torch.tensor([[*first, usable[2 * i]], [*first, usable[2 * i + 1]]])


def _usable_ids(model: PreTrainedModel) -> list[int]:
    """Return up to 64 ids that are no special tokens, or every id of a model that has no others."""
    count = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if not isinstance(count, int):
        count = int(model.config.get_text_config(decoder=True).vocab_size)
    special = _special_ids(model.config)
    return [i for i in range(min(count, 64 + len(special))) if i not in special] or list(range(count))


def _special_ids(config: PreTrainedConfig) -> set[int]:
    ids: set[int] = set()
    for part in (config, config.get_text_config(decoder=True)):
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index")):
                ids.update(v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))
    return ids


def _states(part: Part, inputs: dict[str, Any]) -> torch.Tensor | None:
    """Run a part and return the states (batch, tokens, width) of its body, or None if they have another shape."""
    seen: list[Any] = []
    handle = part.body.register_forward_hook(in_this_thread(lambda _module, _args, output: seen.append(output)))
    head = {"logits_to_keep": 1} if part.called is not part.body and part.signature.logits_to_keep else {}
    try:
        part.called(**inputs, **head)
    finally:
        handle.remove()
    states = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    return states if isinstance(states, torch.Tensor) and states.ndim == 3 else None


def _differ(one: torch.Tensor, two: torch.Tensor) -> bool:
    return not bool(((one == two) | (one.isnan() & two.isnan())).all())


def _beyond_rounding(part: Part, inputs: dict[str, Any], same: torch.Tensor) -> bool:
    """Return True if states that should be equal, `same` (2, T, D), differ by more than the order of a sum."""
    gradient = _gradient_from_the_last_token(part, inputs)
    if gradient is not None and gradient:
        return True
    moved = (same[0] - same[1]).abs().max() / same.abs().max()
    # Without a path for gradients a discrete choice may still depend on the last token, such as an expert's capacity.
    # A router that flips by rounding looks the same in 16 bits, but hardly ever occurs in 32.
    steps = 1000.0 if gradient is not None else 4 * math.sqrt(part.depth + 1)
    return not bool(moved <= steps * torch.finfo(same.dtype).eps)


def _gradient_from_the_last_token(part: Part, inputs: dict[str, Any]) -> bool | None:
    """Return True if the last token's embedding has a gradient from earlier states, None if gradients cannot be had."""
    embedded: list[torch.Tensor] = []

    def leaf(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # families may scale it in place

    handle = part.model.get_input_embeddings().register_forward_hook(in_this_thread(leaf))
    try:
        with torch.enable_grad():
            states = _states(part, inputs)
            assert states is not None  # it had some before
            early = states[:, :-1].float()
            # any weights but equal ones: a LayerNorm's outputs sum to a constant
            weights = torch.arange(1.0, early.shape[-1] + 1, device=early.device).cos()
            gradients = torch.autograd.grad((early * weights).sum(), embedded, allow_unused=True)
    except (RuntimeError, NotImplementedError):  # quantised layers and some kernels have no backward
        return None
    finally:
        handle.remove()
    return any(g is not None and bool((g[:, -1] != 0).any()) for g in gradients)
