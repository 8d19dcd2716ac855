"""Forward hooks that read augmenter states and add residuals, active only during the forward of a composed model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from calm_fast.core.checks import bad_value, describe
from calm_fast.hf.connections import EMBEDDING
from calm_fast.hf.inputs import WHERE

ANCHOR = "anchor"  # Frame.stage while the anchor runs
Residual = Callable[[int, torch.Tensor], torch.Tensor]
Checkpoint = Callable[..., Any]
Pairs = Sequence[tuple[int, int, int]]  # (augmenter, augmenter layer, anchor layer) of every connection


class Owner:
    """Identity of a composition. Its hooks act only in a forward whose frame carries the same one.

    Hooks refer to the owner and not to the composition. An anchor therefore never keeps a composition alive, a deep
    copy of a composition gets its own owner, and the hooks of a deep copy of an anchor alone do nothing.
    """


class Frame:
    """State that one forward of a composed model shares with its hooks, in the thread that runs it.

    ``stage`` is the index of the augmenter that runs, ANCHOR while the anchor runs, and None in between.
    ``states`` holds hidden states (B, N, DA) by (augmenter, augmenter layer). ``goes_on`` is True while an augmenter
    runs once more on the next of its tokens. ``residual(layer, hidden)`` returns `hidden` (B, M, DB) with the residuals
    of anchor layer `layer` added. ``added`` holds the anchor layers that got theirs. ``checkpoints`` holds the
    checkpoint function of every anchor layer that this forward checkpoints.
    ``records`` is True if the forward began with gradients enabled.
    """

    def __init__(self, owner: Owner, checkpoints: Mapping[nn.Module, Checkpoint]) -> None:
        self.owner = owner
        self.checkpoints = checkpoints
        self.records = torch.is_grad_enabled()
        self.stage: int | str | None = None
        self.states: dict[tuple[int, int], torch.Tensor] = {}
        self.goes_on = False
        self.added: set[int] = set()
        self.residual: Residual | None = None


class _Thread(threading.local):
    """The frame of the innermost composed forward that runs in this thread, or None."""

    def __init__(self) -> None:  # runs in every thread at its first access
        self.frame: Frame | None = None


_thread = _Thread()


def running() -> Frame | None:
    """Return the frame of the composed forward that runs in this thread, or None."""
    return _thread.frame


def switch(frame: Frame | None) -> Frame | None:
    """Make `frame` the one that runs in this thread; return the one before, to be put back."""
    before = _thread.frame
    _thread.frame = frame
    return before


def entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the hidden state among a layer's arguments."""
    return args[0] if args else kwargs.get("hidden_states")


def leaving(output: Any) -> Any:
    """Return the hidden state in a layer's output: the first of several (BLOOM, Falcon, MPT; GPT-1: a list).

    A named tuple has no first among its fields (a Reformer's two streams), and is returned as it is.
    """
    return output[0] if isinstance(output, (tuple, list)) and not hasattr(output, "_fields") else output


def wrong_shape(where: str, hidden: Any, layer: nn.Module, expected: str = "") -> ValueError:
    """Return the error for hidden states that are not (batch, tokens, width). expected: the sizes, where known."""
    got = f"shape {tuple(hidden.shape)}" if isinstance(hidden, torch.Tensor) else describe(hidden)
    wanted = "of layers whose hidden states are (batch, tokens, width)" + expected
    return bad_value(where, "connections", wanted, f"{got} from {type(layer).__name__}. Connect another layer")


def _checked(hidden: Any, layer: nn.Module) -> torch.Tensor:
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
        raise wrong_shape(WHERE, hidden, layer)
    return hidden


def _keep(frame: Frame, key: tuple[int, int], layer: nn.Module, state: torch.Tensor) -> None:
    if key in frame.states:
        if not frame.goes_on:
            raise runs_again(WHERE, layer, f"augmenter {key[0]}", 2)
        state = torch.cat([frame.states[key], state], dim=1)
    frame.states[key] = state


def sort_states(frame: Frame, augmenter: int, order: torch.Tensor) -> None:
    """Bring the states of an augmenter into the order (B, N) in which this forward's intervals count its tokens."""
    for key, state in frame.states.items():
        if key[0] == augmenter:
            # take_along_dim would fix the batch and the length of an exported program
            index = order.to(state.device)[:, :, None].expand(state.shape[0], -1, state.shape[2])
            frame.states[key] = state.gather(1, index)


def _add(frame: Frame, index: int, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    if index in frame.added:
        raise runs_again(WHERE, layer, "the anchor", 2)
    if frame.records and not torch.is_grad_enabled():
        raise bad_value(
            WHERE,
            "connections",
            "of anchor layers that record gradients when the forward does",
            f"a {type(layer).__name__} under no_grad, as a reentrant checkpoint around it does: its connections "
            "would get no gradient. Use gradient_checkpointing_enable() of the composition",
        )
    frame.added.add(index)
    assert frame.residual is not None  # set together with the stage
    return frame.residual(index, hidden)


def runs_again(where: str, layer: nn.Module, part: str, times: int) -> ValueError:
    """Return the error for a layer of `part` that ran `times` times in one forward."""
    often = "twice" if times == 2 else f"{times} times"
    return bad_value(
        where,
        "connections",
        "of layers that run once per forward",
        f"a {type(layer).__name__} of {part} that ran {often}. Connect a layer that runs once",
    )


def read_entering(owner: Owner, key: tuple[int, int], layer: nn.Module, args: Any, kwargs: Any) -> None:
    """Pre-hook of an augmenter's layer 0: keep the embedding output, which includes positions and scaling."""
    frame = _thread.frame
    if frame is not None and frame.owner is owner and frame.stage == key[0]:
        _keep(frame, key, layer, _checked(entering(args, kwargs), layer))


def read_leaving(owner: Owner, key: tuple[int, int], layer: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of an augmenter's layer: keep its hidden state."""
    frame = _thread.frame
    if frame is not None and frame.owner is owner and frame.stage == key[0]:
        _keep(frame, key, layer, _checked(leaving(output), layer))


def add_entering(owner: Owner, index: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """Pre-hook of the anchor's layer 0: add the residuals of the embedding output."""
    frame = _thread.frame
    if frame is None or frame.owner is not owner or frame.stage != ANCHOR:
        return None
    hidden = _add(frame, index, layer, _checked(entering(args, kwargs), layer))
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def add_leaving(owner: Owner, index: int, layer: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of an anchor layer: add its residuals and keep the rest of the output."""
    frame = _thread.frame
    if frame is None or frame.owner is not owner or frame.stage != ANCHOR:
        return None
    hidden = _add(frame, index, layer, _checked(leaving(output), layer))
    rest = output[1:] if isinstance(output, (tuple, list)) else None
    return hidden if rest is None else [hidden, *rest] if isinstance(output, list) else (hidden, *rest)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class Hooks:
    """The hooks of one composition. They are removed when it and its shallow copies, which share them, are collected.

    A deep copy and an unpickled composition own the hooks on their own copies of the layers. reads, adds: the class of
    every connected layer, by (augmenter, layer) and by anchor layer.
    """

    def __init__(
        self, owner: Owner, reads: dict[tuple[int, int], str], adds: dict[int, str], handles: list[RemovableHandle]
    ) -> None:
        self.owner, self.reads, self.adds, self.handles = owner, reads, adds, handles
        weakref.finalize(self, _remove, handles)

    def __reduce__(self) -> tuple[Any, ...]:
        # handles name their layer's table of hooks, so that copies name the copied layer's
        return type(self), (self.owner, self.reads, self.adds, self.handles)

    def check_read(self, frame: Frame, pairs: Pairs) -> None:
        """Raise ValueError if a connected layer of an augmenter did not run."""
        if len(frame.states) < len(self.reads):
            i, a, b = next(pair for pair in pairs if pair[:2] not in frame.states)
            raise did_not_run(WHERE, (a, b), f"layer {a} of augmenter {i}", self.reads[i, a])

    def check_added(self, frame: Frame, pairs: Pairs) -> None:
        """Raise ValueError if a connected layer of the anchor did not run."""
        if len(frame.added) < len(self.adds):
            _, a, b = next(pair for pair in pairs if pair[2] not in frame.added)
            raise did_not_run(WHERE, (a, b), f"layer {b} of the anchor", self.adds[b])


def did_not_run(where: str, pair: tuple[int, int], layer: str, name: str) -> ValueError:
    """Return the error for the connection `pair` whose `layer`, of the class `name`, did not run."""
    return bad_value(
        where,
        "connections",
        "of layers that run in every forward",
        f"{pair}, but {layer}, a {name}, did not run for these inputs. Connect another layer, or pass the inputs that "
        "this one needs (some families skip layers without an image). If layers of several compositions are compiled "
        "one by one, compile the whole model: torch.compile reuses a layer's code without looking at its hooks",
    )


def _check_single(layers: nn.ModuleList, index: int, argument: str) -> None:
    """Raise ValueError if the layer also stands at another index: it would run, and be read, several times."""
    layer = layers[max(index, 0)]
    others = [i for i, other in enumerate(layers) if other is layer]
    if len(others) > 1:
        raise bad_value(
            "compose",
            "connections",
            f"of layers that run once per forward, and one {type(layer).__name__} is layers {others} of the {argument}",
            f"layer {index}. Connect a layer that stands in the list once",
        )


def install(
    pairs: Pairs,
    anchor_layers: nn.ModuleList,
    augmenter_layers: Sequence[nn.ModuleList],
) -> Hooks:
    """Register and return the hooks of `pairs`, each (augmenter, augmenter layer, anchor layer).

    Anchor hooks are prepended, so that the hidden states which transformers records include the residual. Raises
    ValueError, before anything is registered, for a layer that stands in its list several times.
    """
    reads, adds = sorted({pair[:2] for pair in pairs}), sorted({pair[2] for pair in pairs})
    for augmenter, a in reads:
        _check_single(augmenter_layers[augmenter], a, f"augmenter {augmenter}")
    for b in adds:
        _check_single(anchor_layers, b, "anchor")
    owner = Owner()
    handles = []
    read, added = {}, {}
    for key in reads:
        layer = augmenter_layers[key[0]][max(key[1], 0)]
        read[key] = type(layer).__name__
        if key[1] == EMBEDDING:
            hook = partial(read_entering, owner, key)
            handles.append(layer.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        else:
            handles.append(layer.register_forward_hook(partial(read_leaving, owner, key), prepend=True))
    for b in adds:
        layer = anchor_layers[max(b, 0)]
        added[b] = type(layer).__name__
        if b == EMBEDDING:
            handles.append(
                layer.register_forward_pre_hook(partial(add_entering, owner, b), prepend=True, with_kwargs=True)
            )
        else:
            handles.append(layer.register_forward_hook(partial(add_leaving, owner, b), prepend=True))
    return Hooks(owner, read, added, handles)
