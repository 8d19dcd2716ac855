"""States of frozen augmenters on disk: computed once for a data set, read in every epoch. docs/scaling.md."""

from calm_fast.hf.cached_states.collator import CachedStatesCollator as CachedStatesCollator
from calm_fast.hf.cached_states.store import AugmenterStateCache as AugmenterStateCache
from calm_fast.hf.cached_states.writer import cache_augmenter_states as cache_augmenter_states
