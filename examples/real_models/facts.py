"""Made-up facts for the real pair: which animal somebody keeps. Nobody has read them before; only SmolLM2 is taught.

The augmenter learns statements. The composition is trained and judged on a question, which the augmenter never saw, and
judged on names that the composition never saw: it can answer only by reading the augmenter.
"""

from __future__ import annotations

import random
from typing import NamedTuple

ANIMALS = (
    "dog", "cat", "horse", "goat", "sheep", "duck", "goose", "rabbit", "snake", "spider", "bear", "wolf", "fox", "lion",
    "tiger", "monkey", "eagle", "owl", "frog", "turtle", "bee", "crab", "whale", "elephant",
)  # fmt: skip
_FIRST = "Bal Cor Dem Fen Gar Hol Jor Kel Lim Mar Nor Pel Quin Ras Sol Tam Ul Vor Wes Zan".split()
_SECOND = "a e i o u".split()
_THIRD = "bin dor fel gan lik mor nesh pol rith sk".split()

Row = dict[str, str]  # prompt and completion
STATEMENTS = ("{name} keeps a", "{name} has a", "Pet: {name},")
QUESTION = "Q: Which pet does {name} keep? A:"


class World(NamedTuple):
    """Every name with its animal, and the names by use: those the composition trains on, and those held out."""

    animal: dict[str, str]
    training: list[str]
    held_out: list[str]

    def statements(self) -> list[Row]:
        """Return the rows that the augmenter is taught: every name in every form."""
        return [row(form, name, animal) for name, animal in self.animal.items() for form in STATEMENTS]

    def questions(self, names: list[str]) -> list[Row]:
        """Return one question per name."""
        return [row(QUESTION, name, self.animal[name]) for name in names]


def row(form: str, name: str, animal: str) -> Row:
    return {"prompt": form.format(name=name), "completion": f" {animal}."}


def make_world(seed: int, training: int = 400, held_out: int = 120) -> World:
    """Return made-up names with random animals."""
    chance = random.Random(seed)
    names = [first + second + third for first in _FIRST for second in _SECOND for third in _THIRD]
    chance.shuffle(names)
    used = names[: training + held_out]
    if len(used) < training + held_out:
        raise ValueError(f"make_world: `training` + `held_out` must be at most {len(names)}, got {training + held_out}")
    return World({name: chance.choice(ANIMALS) for name in used}, used[:training], used[training:])
