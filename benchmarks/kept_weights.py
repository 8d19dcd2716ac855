"""Time calls of a layer as the steps of one generation: folded and packed weights are kept from the first call on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

import calm_fast

_Result = TypeVar("_Result")


def fixed_weights(model: torch.nn.Module) -> AbstractContextManager[Any]:
    """Return `calm_fast.fixed_weights(model)`. A library from before it keeps weights without a scope."""
    scope = getattr(calm_fast, "fixed_weights", None)
    return nullcontext() if scope is None else scope(model)


def as_steps(model: torch.nn.Module, run: Callable[..., _Result]) -> Callable[..., _Result]:
    """Return `run`, all of whose calls lie in one scope of fixed weights; it closes when the result is dropped."""
    given: list[Any] = []

    def steps() -> Iterator[_Result]:
        with fixed_weights(model):
            while True:
                yield run(*given)

    calls = steps()

    def step(*args: Any) -> _Result:
        given[:] = args
        return next(calls)

    return step
