"""Trial runs that the first call of their kind starts: do the parts separate documents, do they leave padding out?

`causality.py` has the trials of compose, and how a part is run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from calm_fast.core.checks import bad_value, require_async, values_checked
from calm_fast.hf.causality import TOKENS, Part, aside, parts, run_part, usable_ids
from calm_fast.hf.inputs import Tokens, part_inputs
from calm_fast.hf.masks import WHERE, refuse_restarts
from calm_fast.hf.prefixes import attention_of, cannot_take, check_prefix_labels, prefix_mask

if TYPE_CHECKING:
    from calm_fast.hf.composed import ComposedForCausalLM
    from calm_fast.hf.composition import Composition
    from calm_fast.hf.encoded_calls import Reading


def check_parts_separate(composed: ComposedForCausalLM, where: str, position_ids: torch.Tensor) -> None:
    """Raise ValueError for a part that does not separate the documents of a packed row, whose positions restart.

    Each part runs once on two rows of two documents. The first documents differ, and the states of the second ones must
    be equal up to rounding. where: the function that errors name. position_ids: (1 or B, M) that restart or were not
    read; over a part that does not separate documents, a GPU asserts that they do not restart.
    """
    for part in () if composed.mixing else parts(composed):
        if part.encoder is None and not _separates_documents(part):
            expected = f"positions that do not restart, because {part.label} does not separate documents by them"
            got = "rows of several documents. Give each document a row of its own, with padding"
            composed.mixing = str(bad_value(where, "position_ids", expected, got))
            break
    if composed.mixing:
        refuse_restarts(position_ids, composed.mixing)
    else:
        composed.separates = True


@torch.no_grad()
def _separates_documents(part: Part) -> bool:
    if not part.signature.position_ids:
        return False
    usable = usable_ids(part.model)
    first, other = (torch.tensor([usable[(i + start) % len(usable)] for i in range(TOKENS)]) for start in (0, TOKENS))
    ids = torch.stack([torch.cat([first, first]), torch.cat([other, first])])
    positions = torch.arange(TOKENS).repeat(2).expand(2, -1)
    device = part.signature.device(part.model)
    with aside(device):
        tokens = Tokens(input_ids=ids, attention_mask=None, position_ids=positions)
        states, _ = run_part(part, part_inputs(part.model, part.signature, tokens, None, 0))
    if states is None:
        return True  # not (batch, tokens, width): the forward refuses to connect such a layer
    return close(states[0, TOKENS:], states[1, TOKENS:], part.depth)


def close(one: torch.Tensor, two: torch.Tensor, depth: int) -> bool:
    """Return True if states that two runs of `depth` layers should give alike differ by rounding only."""
    steps = 4 * math.sqrt(depth + 1) if one.dtype.itemsize < 4 else 1000.0
    bound = steps * torch.finfo(one.dtype).eps * one.float().abs().max()
    return bool((one.float() - two.float()).abs().max() <= bound)


def check_padding(composed: Composition, where: str, masks: Sequence[torch.Tensor | None]) -> None:
    """Raise ValueError for padding before a token in a part that may count it and whose layers do not leave it out.

    masks: of the anchor and of every augmenter, each (B, T) or None. A part without a Cache (RWKV), or whose forward
    takes no positions (the decoders of BART and Whisper), runs once on a padded row, and its states are compared with
    those of the row alone; a traced call takes one without a Cache for one that reads padding. It runs at the first
    call with a mask, whatever the mask hides: with sharded weights all processes must run it. Where the mask is not
    read (a GPU), the device asserts that it hides nothing before a token.
    """
    for index, (mask, counts) in enumerate(zip(masks, composed.may_count, strict=True)):
        if mask is None or not counts or composed.leaves_out.get(index, False):  # so it is in every step but the first
            continue
        part = parts(composed)[index]
        if part.signature.device(part.model).type == "meta":
            continue
        if not torch.compiler.is_compiling() and index not in composed.leaves_out:
            composed.leaves_out[index] = _leaves_padding_out(part)
        if composed.leaves_out.get(index, not part.signature.recomputes):
            continue
        real = mask.bool()
        early = (~real[:, :-1] & real[:, 1:]).any()
        if values_checked(mask) and not bool(early):
            continue
        expected = (
            f"1 for every token before the last real one, because {part.label} reads padding as text or counts it"
        )
        got = "padding before a token. Pad on the right, and run rows of other lengths one by one"
        problem = str(bad_value(where, "attention_mask", expected, got))
        if values_checked(mask):
            raise ValueError(problem)
        require_async(~early, problem)


@torch.compiler.disable
def try_encoders(composed: Composition, readings: Mapping[int, Reading]) -> None:
    """Find out whether the bidirectional augmenters of `readings` read a padded text as they read it alone.

    Not every encoder does: FNet mixes all tokens, and Nystromformer has a convolution that reads padding. Each runs
    once, at its first texts, whatever their lengths: with sharded weights all processes must run it. One that reads
    padding reads only texts of one length together.
    """
    for index, reading in readings.items():
        encoder = composed.encoders[index]
        if encoder is not None and encoder.padded is None and reading.texts:
            composed.encoders[index] = encoder._replace(padded=_encodes_padded(parts(composed)[index + 1]))


@torch.no_grad()
def _encodes_padded(part: Part) -> bool:
    assert part.encoder is not None
    device = part.signature.device(part.model)
    if not part.encoder.masked or device.type == "meta":
        return False
    usable = usable_ids(part.model)
    row = torch.tensor([[usable[i % len(usable)] for i in range(TOKENS)] + [part.encoder.pad] * TOKENS])
    mask = (torch.arange(2 * TOKENS) < TOKENS).long()[None]
    states = []
    with aside(device):
        for kept in (2 * TOKENS, TOKENS):
            inputs = part.encoder.inputs(row[:, :kept].to(device), mask[:, :kept].to(device))
            states.append(run_part(part, inputs)[0])
    padded, alone = states
    return padded is not None and alone is not None and close(padded[0, :TOKENS], alone[0], part.depth)


@torch.no_grad()
def _leaves_padding_out(part: Part) -> bool:
    usable = usable_ids(part.model)
    # no padding token: a family may know its own and leave it out without a mask
    row = torch.tensor([[usable[i % len(usable)] for i in range(2 * TOKENS)]])
    mask = (torch.arange(2 * TOKENS) >= TOKENS).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    device = part.signature.device(part.model)
    states = []
    with aside(device):
        # alone the part finds its positions itself
        for kept, given in ((slice(0, None), positions), (slice(TOKENS, None), None)):
            tokens = Tokens(input_ids=row[:, kept], attention_mask=mask[:, kept], position_ids=given)
            states.append(run_part(part, part_inputs(part.model, part.signature, tokens, None, 0))[0])
    padded, alone = states
    return padded is not None and alone is not None and close(padded[0, TOKENS:], alone[0], part.depth)


def check_prefix_call(
    composed: ComposedForCausalLM,
    prefix: torch.Tensor,
    packed: bool,
    labels: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Raise ValueError if a call cannot have a prefix of the lengths (B, 1).

    packed: positions restart, or were not read. labels (B, M), kwargs: of the call.
    """
    if packed:
        got = "a value for rows whose positions may restart. Pass `attention_mask`, and one document per row"
        raise bad_value(WHERE, "prefix_lengths", "None for rows of several documents", got)
    check_prefix_labels(prefix, labels, kwargs)
    _check_prefix_mask(composed, WHERE)


@torch.no_grad()
def _check_prefix_mask(composed: ComposedForCausalLM, where: str) -> None:
    """Raise ValueError if the anchor cannot be given a prefix mask.

    Its layers must all have full attention of an implementation that takes a mask (B, 1, M, N). The anchor runs once:
    a causal mask of this shape must give the states of the mask (B, N), a prefix mask must let tokens of the prefix see
    its last one and no later one. The outcome is kept for the implementation. On the meta device nothing runs.
    """
    anchor, part = composed.anchor, parts(composed)[0]
    kind = attention_of(anchor)
    problem = cannot_take(anchor) or composed.prefix_problems.get(kind)
    if problem is None and part.signature.device(anchor).type != "meta":
        if torch.compiler.is_compiling():
            expected = "given in a call without torch.compile first, which tries the anchor"
            raise bad_value(where, "prefix_lengths", expected, "a compiled call")
        problem = composed.prefix_problems[kind] = _mask_problem(part)
    if problem:
        expected = f"None for the anchor {type(anchor).__name__}, {problem}"
        got = "a value. Take an anchor whose layers all have full attention, such as Llama"
        raise bad_value(where, "prefix_lengths", expected, got)


def _mask_problem(part: Part) -> str:
    """Return what is wrong with the states that `part` gives under a mask (B, 1, M, N), or ""."""
    usable = usable_ids(part.model)
    # not as many rows as tokens, so that no wrong shape fits
    rows = torch.tensor([[usable[i % len(usable)] for i in range(TOKENS)]]).repeat(TOKENS + 1, 1)
    other = next((i for i in usable if i not in rows[0]), usable[0])
    rows[1, -2], rows[2, -1] = other, other
    mask = torch.ones_like(rows)
    mask[3, 0] = 0
    # without positions: a family that counts them in the mask must be noticed
    tokens = Tokens(input_ids=rows, attention_mask=mask, position_ids=None)
    states = []
    with aside(part.signature.device(part.model)):
        for length in (None, 0, TOKENS - 1):
            inputs = part_inputs(part.model, part.signature, tokens, None, 0)
            if length is not None:
                prefix = torch.full((len(rows), 1), length)
                inputs["attention_mask"] = prefix_mask(part.model, prefix, mask, TOKENS, TOKENS)
            try:
                found, _ = run_part(part, inputs)
            except Exception as problem:  # whatever a family makes of the shape
                return f"which does not take an attention mask per token ({type(problem).__name__}: {problem})"
            if found is None:
                return "whose states are not (batch, tokens, width)"
            states.append(found)
    plain, causal, wide = states
    real = mask.bool()
    if not close(plain[real], causal[real], part.depth):
        return "which takes an attention mask per token for something else"
    inside, seen = wide[:, : TOKENS - 2].float(), wide[:, : TOKENS - 1].float()
    # rows 0 and 1 differ in the prefix's last token, rows 0 and 2 in the token after it
    moved, noise = (inside[0] - inside[1]).abs().max(), (seen[0] - seen[2]).abs().max()
    if not close(seen[0], seen[2], part.depth) or not bool(moved > 8 * noise):
        return "whose layers do not follow a prefix mask"
    return ""
