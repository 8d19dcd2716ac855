"""Trial runs of models on a few tokens: which layers run, and whether a state depends on what it must not see.

`check_parts` tries every part of a composition, `check_causal` a model alone. `trials.py` has those that a call starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from calm_fast.core.checks import bad_value
from calm_fast.core.eval_mode import eval_mode
from calm_fast.core.threads import in_this_thread
from calm_fast.hf.connections import EMBEDDING
from calm_fast.hf.encoders import HINT, Encoder
from calm_fast.hf.hooks import did_not_run, entering, leaving, runs_again, wrong_shape
from calm_fast.hf.inputs import Signature, Tokens, part_inputs
from calm_fast.hf.layers import headless_path, hidden_size, submodule

if TYPE_CHECKING:
    from calm_fast.hf.composition import Composition

TOKENS = 4  # of a probe's rows: three that are the same, and the last one
PAIRS = 3  # of last tokens, tried until one pair differs

# settings that are known to make a model read the future: name -> the values that do
_SETTINGS = {
    "is_decoder": (False,),
    "use_bidirectional_attention": (True, "all"),
    "is_causal": (False,),
    "causal": (False,),
}


class Part(NamedTuple):
    """A part of a composition. argument, label, name: its names in errors.

    called: the module that a composed forward calls: the anchor itself, which may build masks of its own, or an
    augmenter's body. body: the headless module inside it, whose output is compared; of an encoder-decoder, its decoder.
    connected: (the layer, the first connection that has it) by layer index. encodes: the model is an encoder-decoder.
    reads_ahead: the part reads a source that is known in full, so no token of it is a future one. encoder: how a
    bidirectional augmenter is called.
    """

    argument: str
    label: str
    name: str
    model: PreTrainedModel
    called: nn.Module
    body: nn.Module
    signature: Signature
    depth: int
    connected: dict[int, tuple[nn.Module, tuple[int, int]]]
    encodes: bool = False
    reads_ahead: bool = False
    encoder: Encoder | None = None


def parts(composed: Composition) -> list[Part]:
    """Return the anchor and every augmenter's truncated view."""
    anchor, path = composed.anchor, composed.config.anchor_layers
    assert path is not None  # found at construction
    body = submodule(anchor, headless_path(anchor, path))
    layers: Any = anchor.get_submodule(path)
    connected = {b: (layers[max(b, 0)], (a, b)) for _, a, b in reversed(composed.pairs)}
    kind = type(anchor).__name__
    encodes = composed.encoder_decoder
    first = Part(
        "anchor", kind, "the anchor", anchor, anchor, body, composed.signatures[0], len(layers), connected, encodes
    )
    found = [first]
    for index, depth in enumerate(composed.depths):
        model, signature = composed._augmenter(index), composed.signatures[index + 1]
        name = f"augmenter {index}"
        body = submodule(model, composed.headless[index])
        layers = model.get_submodule(str(composed.config.augmenter_layers[index]))
        connected = {a: (layers[max(a, 0)], (a, b)) for i, a, b in reversed(composed.pairs) if i == index}
        label = f"{name} ({type(model).__name__})"
        encoder = composed.encoders[index]
        ahead = encodes or encoder is not None
        part = Part("augmenters", label, name, model, body, body, signature, depth, connected, False, ahead, encoder)
        found.append(part)
    return found


def check_parts(composed: Composition, where: str, *, defer: bool) -> None:
    """Raise ValueError for a part of `composed` that cannot be connected as asked, or that reads future tokens.

    Each part runs once on two rows of four tokens that differ in the last one. Every connected layer must have run
    exactly once and given a state (batch, tokens, width). The states before the last token must be equal bit for bit.
    If they are not (the rounding of a mixture of experts depends on all tokens), the gradient of these states by the
    last token's embedding must be exactly zero.

    where: the function that errors name. defer: leave a part that cannot run here (no weights yet, kernels of another
    device) to the first forward, which raises what it raises.
    """
    unproven = False
    for part in parts(composed):
        if part.signature.device(part.model).type == "meta":  # no values yet: the forward only infers shapes
            unproven = True
            continue
        try:
            trial = _try(part)
        except Exception:
            if not defer:
                raise
            unproven = True
            continue
        _check_connected(part, trial.states, where)
        if trial.moved:
            own = part.argument == "augmenters"
            of = cast(PreTrainedModel, part.body) if part.encodes else part.model
            expected = "models that read no future token" if own else "a causal model"
            got = f"{part.label}, in which the last token changes the states before it{_reason(of.config)}"
            hint = f"; or {HINT}" if own else ""
            raise bad_value(where, part.argument, expected, f"{got}; if it is one, pass probe=False{hint}")
    composed.unproven = unproven


def check_causal(where: str, argument: str, model: PreTrainedModel, run: Callable[[torch.Tensor], Any]) -> None:
    """Raise ValueError if a token's logits depend on the tokens that follow it.

    Such a model (a BERT or XLM that is no decoder, CPM-Ant) reads the token it is asked to predict, so that one forward
    of a text does not give the probabilities of generation. where, argument: the function and its argument that an
    error names. run: ids (B, M) int64 -> the output of a forward, which has logits.
    """
    config = model.config.get_text_config(decoder=True)
    depth = getattr(config, "num_hidden_layers", 32)
    with eval_mode(model):
        moved = _last_token_matters(model, lambda ids: [run(ids.to(model.device)).logits], depth, model.device)
    if moved:
        got = f"{type(model).__name__}, whose logits at a token depend on the tokens after it{_reason(model.config)}"
        raise bad_value(where, argument, "a causal language model", got)


def _reason(config: PreTrainedConfig) -> str:
    text = config.get_text_config(decoder=True)
    for name, values in _SETTINGS.items():
        value = getattr(text, name, None)
        if any(value is v or value == v for v in values if type(v) is type(value)):
            other = next(v for v in (True, False) if v is not value) if isinstance(value, bool) else None
            return f" (its config says {name}={value!r}). Load it with {name}={other!r}, or use a causal model"
    return ". Use a causal language model"


class _Trial(NamedTuple):
    """A part's trial run. states: of each connected layer, one for every time it ran.

    moved: True if the last token changes states before it; known only if the connected layers are as they must be.
    """

    states: dict[int, list[Any]]
    moved: bool


@torch.no_grad()
def _try(part: Part) -> _Trial:
    states: dict[int, list[Any]] = {}

    def run(ids: torch.Tensor) -> list[torch.Tensor]:
        nonlocal states
        output, states = run_part(part, _inputs(part, ids))
        one = [seen[0] for seen in states.values() if len(seen) == 1 and is_state(seen[0])]
        sound = [state for state in one if state.shape[:2] == ids.shape]  # the others are refused after the trial
        return sound if output is None else [output, *sound]

    if part.reads_ahead:  # by design
        with aside(part.signature.device(part.model)):
            run(next(_probes(part.model)))
        return _Trial(states, False)
    # the tokens whose order counts are the decoder's
    embedding = cast(PreTrainedModel, part.body) if part.encodes else part.model
    moved = _last_token_matters(embedding, run, part.depth, part.signature.device(part.model))
    return _Trial(states, moved)


def _inputs(part: Part, ids: torch.Tensor) -> dict[str, Any]:
    """Return the arguments with which a part reads ids (2, TOKENS), a decoder after one source for both rows."""
    if part.encoder is not None:
        ids = ids.to(part.signature.device(part.model))
        return part.encoder.inputs(ids, torch.ones_like(ids))
    if not part.encodes:
        tokens = Tokens(input_ids=ids, attention_mask=None, position_ids=None)
        return part_inputs(part.model, part.signature, tokens, None, 0)
    ids = ids.to(part.signature.device(part.model))
    return {"input_ids": ids[:1].expand(2, -1), "decoder_input_ids": ids, "use_cache": False}


def _check_connected(part: Part, states: dict[int, list[Any]], where: str) -> None:
    """Raise ValueError unless every connected layer of a part ran once, with a state (2, TOKENS, width)."""
    wanted = (2, TOKENS, hidden_size(part.model))
    for index, (layer, pair) in part.connected.items():
        seen = states[index]
        if not seen:
            raise did_not_run(where, pair, f"layer {index} of {part.name}", type(layer).__name__)
        if len(seen) > 1:
            raise runs_again(where, layer, part.name, len(seen))
        if not isinstance(seen[0], torch.Tensor) or tuple(seen[0].shape) != wanted:
            raise wrong_shape(where, seen[0], layer, f", here {wanted} in {part.label}")


def is_state(state: Any) -> bool:
    return isinstance(state, torch.Tensor) and state.ndim == 3 and state.shape[1] > 1


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Keep the random state, and run eagerly: a compiled part would be compiled for the probe's shape."""
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
def _last_token_matters(
    model: PreTrainedModel, run: Callable[[torch.Tensor], list[torch.Tensor]], depth: int, device: torch.device
) -> bool:
    """Return True if the states (2, tokens, width) that `run(ids)` gives change with a token that follows them.

    depth: number of layers, for the bound on rounding.
    """
    with aside(device):
        for ids in _probes(model):
            states = run(ids)
            if not any(_differ(state[0, -1], state[1, -1]) for state in states):
                continue  # two tokens that the model does not tell apart
            same = [state[:, :-1] for state in states]
            if not any(_differ(one, two) for one, two in same):
                return False
            return _beyond_rounding(model, partial(run, ids), same, depth)
    return False


def _probes(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Yield ids (2, TOKENS): rows that differ in the last token, without special tokens if there are others."""
    usable = usable_ids(model)
    first = [usable[i % len(usable)] for i in range(1, TOKENS)]
    for i in range(min(PAIRS, len(usable) // 2)):
        yield torch.tensor([[*first, usable[2 * i]], [*first, usable[2 * i + 1]]])


def usable_ids(model: PreTrainedModel) -> list[int]:
    """Return up to 64 ids that are no special tokens nor 0, or every id of a model that has no others."""
    count = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if not isinstance(count, int):
        count = int(model.config.get_text_config(decoder=True).vocab_size)
    special = _special_ids(model.config)
    # not 0 either: some families take it for padding, whatever their config says
    return [i for i in range(1, min(count, 65 + len(special))) if i not in special] or list(range(count))


def _special_ids(config: PreTrainedConfig) -> set[int]:
    ids: set[int] = set()
    for part in (config, config.get_text_config(decoder=True)):
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index")):
                ids.update(v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))
    return ids


def run_part(part: Part, inputs: dict[str, Any]) -> tuple[torch.Tensor | None, dict[int, list[Any]]]:
    """Run a part; return its body's output, None if it is not (batch, tokens, width), and the connected states."""
    outputs: list[Any] = []
    states: dict[int, list[Any]] = {index: [] for index in part.connected}

    def record(module: nn.Module, hook: Callable[..., Any], before: bool = False) -> RemovableHandle:
        if before:
            return module.register_forward_pre_hook(in_this_thread(hook), prepend=True, with_kwargs=True)
        return module.register_forward_hook(in_this_thread(hook), prepend=True)

    def enters(index: int, _module: nn.Module, args: Any, kwargs: Any) -> None:
        states[index].append(entering(args, kwargs))

    def leaves(index: int, _module: nn.Module, _args: Any, output: Any) -> None:
        states[index].append(leaving(output))

    handles = [record(part.body, lambda _module, _args, output: outputs.append(output))]
    for index, (layer, _) in part.connected.items():
        hook = enters if index == EMBEDDING else leaves
        handles.append(record(layer, partial(hook, index), before=index == EMBEDDING))
    try:
        part.called(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    output = outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0]
    return (output if is_state(output) else None), states


def _differ(one: torch.Tensor, two: torch.Tensor) -> bool:
    return not bool(((one == two) | (one.isnan() & two.isnan())).all())


def _beyond_rounding(
    model: PreTrainedModel, run: Callable[[], list[torch.Tensor]], same: list[torch.Tensor], depth: int
) -> bool:
    """Return True if states that should be equal, `same` (2, T, D) each, differ by more than the order of a sum."""
    gradient = _gradient_from_the_last_token(model, run)
    if gradient is not None and gradient:
        return True
    # Without a path for gradients a discrete choice may still depend on the last token, such as an expert's capacity.
    # A router that flips by rounding looks the same in 16 bits, but hardly ever occurs in 32.
    steps = 1000.0 if gradient is not None else 4 * math.sqrt(depth + 1)
    return not all(
        bool((both[0] - both[1]).abs().max() <= steps * torch.finfo(both.dtype).eps * both.abs().max()) for both in same
    )


def _gradient_from_the_last_token(model: PreTrainedModel, run: Callable[[], list[torch.Tensor]]) -> bool | None:
    """Return True if the last token's embedding has a gradient from earlier states, None if gradients cannot be had."""
    embedded: list[torch.Tensor] = []

    def leaf(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # families may scale it in place

    handle = model.get_input_embeddings().register_forward_hook(in_this_thread(leaf))
    try:
        with torch.enable_grad():
            early = [state[:, :-1].float() for state in run()]
            # any weights but equal ones: a LayerNorm's outputs sum to a constant
            sums = [(s * torch.arange(1.0, s.shape[-1] + 1, device=s.device).cos()).sum() for s in early]
            gradients = torch.autograd.grad([s for s in sums if s.requires_grad], embedded, allow_unused=True)
    except (RuntimeError, NotImplementedError):  # quantised layers and some kernels have no backward
        return None
    finally:
        handle.remove()
    return any(g is not None and bool((g[:, -1] != 0).any()) for g in gradients)
