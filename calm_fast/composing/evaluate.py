"""Held-out losses of the augmenters alone, the anchor alone and the composition, side by side."""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from calm_fast._version import versions
from calm_fast.composing.batches import collator, single_collator
from calm_fast.composing.data import Example, check_prompts, check_template, encode_all, read_texts
from calm_fast.composing.memory import gib, names_of, peak_bytes, weigh_composition
from calm_fast.composing.models import composition_tokenizer, examples_for, load_model, load_tokenizer, untrained
from calm_fast.composing.scoring import RowLosses, compare, describe, row_losses
from calm_fast.core.checks import bad_value
from calm_fast.core.devices import usable_device
from calm_fast.core.files import write_json
from calm_fast.hf import ComposedForCausalLM

_WHERE = "eval"
Say = Callable[[str], None]
UNTRAINED = "W_o of every connection is zero, so the composition is its anchor; train it"


def augmenter_losses(
    model: PreTrainedModel, tokenizer: Any, held: Sequence[Example], same_ids: bool, device: torch.device,
    *, where: str, title: str | None, template: Mapping[str, Any] | None = None,
) -> RowLosses:  # fmt: skip
    """Score an augmenter alone on the held-out rows: on the anchor's ids, or on its own tokens of the same text."""
    own = list(held)
    if not same_ids:
        own = examples_for([e.row for e in held], tokenizer, model, where, "augmenter", template)
    return row_losses(model, own, single_collator(tokenizer), device, title=title)


def compared(losses: dict[str, RowLosses], same_ids: Sequence[bool]) -> dict[str, Any]:
    """Return what results.json holds of the losses: each model's, and the differences to the composition's.

    losses: of "A" (or "A1", "A2", ...), "B" and "A+B"; an encoder has none, and None in the results. same_ids: per
    augmenter, True if it reads the anchor's ids.
    """
    names = names_of(len(same_ids))
    found: dict[str, Any] = {name: describe(losses[name]) if name in losses else None for name in (*names, "B", "A+B")}
    differences = {"A+B - B": compare(losses["A+B"], losses["B"], "tokens")}
    for name, same in zip(names, same_ids, strict=True):
        if name in losses:
            differences[f"A+B - {name}"] = compare(losses["A+B"], losses[name], "tokens" if same else "bytes")
    return {"models": found, "differences": differences, "same_tokenizer": dict(zip(names, same_ids, strict=True))}


def warnings_of(held: dict[str, Any], model: ComposedForCausalLM) -> list[str]:
    """Return what a user should know about a composition before using it."""
    found = [UNTRAINED] if untrained(model) else []
    losses = {name: row["loss_per_token"] for name, row in held.get("models", {}).items() if row is not None}
    found += [f"the held-out loss of {name} is not finite" for name, loss in losses.items() if loss is None]
    ours, anchor = losses.get("A+B"), losses.get("B")
    if ours is not None and anchor is not None and ours > anchor:
        found.append(
            f"the held-out loss of A+B ({ours:.4f}) is above that of B alone ({anchor:.4f}): the connections learned "
            "their training rows by heart, or the learning rate is too high. More rows help most"
        )
    return found


def same_tokens(held: dict[str, Any]) -> bool:
    """Return True if the losses per token of `compared` count the same tokens. An encoder has no loss."""
    return all(same for name, same in held["same_tokenizer"].items() if held["models"][name] is not None)


def print_losses(held: dict[str, Any], say: Say) -> None:
    """Print the losses of `compared` as a table."""
    same = same_tokens(held)
    say(f"held out, {held['models']['B']['rows']} rows" + ("" if same else
        "; losses per token of different tokenizers cannot be compared: compare bits per byte"))  # fmt: skip
    say(f"{'':5}{'nats/token':>12}{'perplexity':>12}{'bits/byte':>11}{'tokens':>9}")
    for name, row in held["models"].items():
        if row is None:
            say(f"{name:5}{'-':>12}{'-':>12}{'-':>11}{'-':>9}  an encoder, which has no loss of its own")
            continue
        cells = [row["loss_per_token"], row["perplexity"], row["bits_per_byte"]]
        texts = ["-" if cell is None else f"{cell:.4f}" if cell < 1e4 else f"{cell:.3g}" for cell in cells]
        say(f"{name:5}{texts[0]:>12}{texts[1]:>12}{texts[2]:>11}{row['tokens']:>9}")
    for name, row in held["differences"].items():
        inside = (
            "" if row["interval"] is None else f", 95 % interval {row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}"
        )
        value = "-" if row["difference"] is None else f"{row['difference']:+.4f}"
        say(f"{name}: {value} {row['unit']}{inside}")


def evaluate_folder(
    folder: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    device: str | None = None,
    progress: bool = True,
    say: Say = print,
) -> dict[str, Any]:
    """Score a saved composition, its anchor and its augmenters on the rows of `data`, as `calm-fast eval` does.

    Args:
        folder: of a composition. data: rows as in `read_texts`. out: folder that gets results.json. limit: most rows.
        max_length: most tokens of an example; default, that of the composition's training, else 512.
        chat_template_kwargs: variables for the chat template of rows with messages; default, those of the training.
    Returns:
        the content of results.json.
    Raises:
        ValueError: a row is wrong, or the folder holds no composition with its models.
    """
    rows = read_texts(data, limit)
    target = usable_device(_WHERE, device)
    model = ComposedForCausalLM.from_pretrained(folder)
    model.to(target)
    paths = [model.config.anchor_path, *model.config.augmenter_paths]
    tokenizer = composition_tokenizer(_WHERE, os.fspath(folder), paths[0])
    trained = _trained_with(folder)
    max_length = int(trained.get("max_length", 512)) if max_length is None else max_length
    check_template(rows, chat_template_kwargs, _WHERE)
    template = trained.get("chat_template_kwargs") if chat_template_kwargs is None else chat_template_kwargs
    left_out: Counter[str] = Counter()
    held = encode_all(rows, tokenizer, max_length, left_out, template)
    if not held:
        raise bad_value(_WHERE, "data", "rows with something to score", f"none of {len(rows)}: {dict(left_out)}")
    modes = model.config.bidirectional
    check_prompts(held, modes, _WHERE, "data")
    weight = weigh_composition(model, paths)
    for line in weight.lines():
        say(line)
    say(f"memory expected: {gib(weight.weights)} of weights, and one augmenter at a time in whole")
    collate = collator(model, tokenizer)
    same = [aligner is None for aligner in model.aligners]
    losses = {}
    for place, (name, path) in enumerate(zip(names_of(len(same)), paths[1:], strict=True)):
        if modes[place] is not None:
            continue  # an encoder has no loss of its own
        dtype = str(model.augmenters[place].dtype).removeprefix("torch.")
        whole = load_model(_WHERE, "folder", path, dtype, target)
        own = tokenizer if same[place] else load_tokenizer(_WHERE, "folder", path)
        title = name if progress else None
        losses[name] = augmenter_losses(
            whole, own, held, same[place], target, where=_WHERE, title=title, template=template
        )
        del whole
        gc.collect()
    for name, part, batches in (("B", model.anchor, single_collator(tokenizer)), ("A+B", model, collate)):
        losses[name] = row_losses(part, held, batches, target, title=name if progress else None)
    found = compared(losses, same)
    results = {
        "folder": os.fspath(folder), "data": os.fspath(data), "rows": len(rows), "left_out": dict(left_out),
        "max_length": max_length, "chat_template_kwargs": template, "held_out": found,
        "warnings": warnings_of(found, model),
        "memory": {"weights": weight.weights, "peak": peak_bytes(target)}, "versions": versions(),
    }  # fmt: skip
    print_losses(found, say)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / "results.json", results)
    return results


def _trained_with(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the settings that the composition in `folder` was trained with, if a run of `compose` says so."""
    file = Path(folder) / "run.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
