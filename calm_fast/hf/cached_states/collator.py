"""CachedStatesCollator: batches that hold the augmenters' states, read from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calm_fast.core.checks import bad_type, bad_value
from calm_fast.hf.cached_states.key import collator_differences

if TYPE_CHECKING:
    from calm_fast.hf.cached_states.store import AugmenterStateCache

WHERE = "CachedStatesCollator"


class CachedStatesCollator:
    """Makes the batches of another collator, and adds `augmenter_hidden_states` from a cache.

    ComposedForCausalLM.forward takes them in place of running its augmenters. The dataset stays as it is, and rows are
    found by their ids, in any order and in any batch.

    Args:
        cache: an AugmenterStateCache with all its shards. collator: makes batches with padding on the right, or packed
            ones (`AlignedCollator`, or one of transformers).
    Raises:
        TypeError, ValueError: shards are missing, or the collator makes rows in another way than the cache's did. A
            call: a row that is not in the cache.
    """

    def __init__(self, cache: AugmenterStateCache, collator: Callable[[Sequence[Any]], Any]) -> None:
        if not callable(collator):
            raise bad_type(WHERE, "collator", "a callable that makes a batch of rows", collator)
        if differ := collator_differences(cache.collator_key, collator):
            got = f"one with {'; '.join(differ)}. Give both collators the same settings"
            raise bad_value(WHERE, "collator", f"one that makes the rows of {cache.directory}", got)
        cache.open()
        self.cache, self.base = cache, collator

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return the batch of `rows`."""
        batch = self.base(rows)
        if not isinstance(batch, Mapping):
            raise bad_type(WHERE, "collator", "a callable that returns a dict of forward's arguments", batch)
        return {**batch, "augmenter_hidden_states": self.cache.states(batch)}
