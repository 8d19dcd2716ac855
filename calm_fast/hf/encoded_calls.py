"""One call of a composed model with bidirectional augmenters: which texts they read in full, and who reads them.

Prompt lengths, masks and ids are read on the host. Nothing of this runs for augmenters that read causally.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from calm_fast.core.checks import bad_value
from calm_fast.core.dispatch import active_transform
from calm_fast.hf.aligned_calls import OWN, check_rows, listed, on_host, prompt_ends
from calm_fast.hf.cache import ComposedCache
from calm_fast.hf.encoded_text import EncodedText, Span, reading_points, shown_tokens
from calm_fast.hf.encoders import Encoder
from calm_fast.hf.hooks import Frame
from calm_fast.hf.inputs import Tokens
from calm_fast.hf.masks import WHERE, check_shape, refuse_restarts

CHUNK = 64  # texts that an augmenter reads at once
_NO_GRAPH = "a bidirectional augmenter needs the prompt's length and the ids on the host"


class WholeReader(Protocol):
    """What a call needs of a `StreamAligner` for a bidirectional augmenter."""

    def whole(self, b_ids: Sequence[int]) -> list[int]: ...


class Reading(NamedTuple):
    """What one bidirectional augmenter reads in a call, and who reads it.

    texts: its ids of every text that it reads in full; none if the cached encodings stay. ids: (1, T) int64, all of
    them, one after the other. places: (B, N) int64, which of the T the slots of the connections hold. lo, hi: (B, M)
    int32, of slots. own: True if the ids are of its own tokenizer. fresh: the slots replace those in the cache.
    """

    texts: list[list[int]]
    ids: torch.Tensor
    places: torch.Tensor
    lo: torch.Tensor
    hi: torch.Tensor
    own: bool
    fresh: bool


class _Grown(NamedTuple):
    """How a text grows by a call: its new tokens, points, prompt ends, and the spans of the last points."""

    shown: list[list[int | None]]
    points: list[list[int]]
    prompt: Any
    spans: list[Span]
    slots: int


class EncodedCall:
    """What every bidirectional augmenter reads in one call; `commit` notes it in the cache."""

    def __init__(self) -> None:
        self.readings: dict[int, Reading] = {}
        self.texts: dict[int, tuple[EncodedText, _Grown]] = {}

    def commit(self, cache: ComposedCache) -> None:
        """Go on with the texts of `cache`, and drop encodings that are replaced."""
        for index, (text, grown) in self.texts.items():
            cache.texts[index] = text
            text.prompt, text.spans, text.slots = grown.prompt, grown.spans, grown.slots
            empty: list[list[Any]] = [[] for _ in grown.shown]
            text.rows, text.points = text.rows or empty, text.points or [[] for _ in grown.shown]
            for row, shown in zip(text.rows, grown.shown, strict=True):
                row.extend(shown)
            for row, points in zip(text.points, grown.points, strict=True):
                row.extend(points)
            if self.readings[index].fresh:
                cache.drop_keys(index)


def encode_call(
    encoders: Sequence[Encoder | None],
    aligners: Sequence[WholeReader | None],
    inputs: Tokens,
    external: dict[str, Any],
    cache: ComposedCache | None,
    cached: bool | None,
    past: int,
    prompt_length: Any,
    labelled: bool,
) -> EncodedCall:
    """Return what each bidirectional augmenter reads in this call.

    inputs: the anchor's. external: the arguments of `augmenter_calls`. cached: False if no cache is kept.
    prompt_length: see `ComposedForCausalLM.forward`. labelled: the call computes a loss or is in training mode.

    Raises ValueError for arguments about such an augmenter's tokens, for rows of several documents, for ids that cannot
    be read, and if nothing says where the prompt ends.
    """
    call = EncodedCall()
    wanted = [index for index, encoder in enumerate(encoders) if encoder is not None]
    if not wanted:
        return call
    ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
    for name in OWN:
        if any(listed(external[name], len(encoders))[index] is not None for index in wanted):
            got = "a value. Leave it out, or pass a list with None for this augmenter: the model gives it its text"
            raise bad_value(WHERE, name, "None for a bidirectional augmenter", got)
    _check_readable(ids)
    if mask is None and cache is None and positions is not None and positions.ndim == 2:
        expected = "positions that do not restart if an augmenter is bidirectional"
        got = "rows of several documents. Give each document a row of its own, with padding"
        refuse_restarts(positions, str(bad_value(WHERE, "position_ids", expected, got)))
    _read(call, encoders, aligners, ids, mask, cache, cached, past, prompt_length, labelled)
    return call


@torch.compiler.disable(reason=_NO_GRAPH)
def _read(
    call: EncodedCall,
    encoders: Sequence[Encoder | None],
    aligners: Sequence[WholeReader | None],
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    cache: ComposedCache | None,
    cached: bool | None,
    past: int,
    prompt_length: Any,
    labelled: bool,
) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(f"{WHERE}: torch.export cannot trace this call, because {_NO_GRAPH}")
    batch, new = ids.shape
    if mask is not None:
        check_shape("attention_mask", mask, batch, past, new)
    rows, real = on_host(ids, mask, past)
    ends = prompt_ends(prompt_length, batch)
    for index, encoder in enumerate(encoders):
        if encoder is None:
            continue
        text = _text(cache, index, past)
        check_rows(text, batch)
        if ends is None and text.prompt is None and past == 0 and (cached is False or labelled):
            expected = "given, because a bidirectional augmenter reads the prompt only"
            got = "None. Pass the number of tokens before the answer: an int, or a tensor (batch,)"
            raise bad_value(WHERE, "prompt_length", expected, got)
        reading, grown = _read_text(encoder, aligners[index], text, rows, real, ends, ids.device)
        call.readings[index], call.texts[index] = reading, (text, grown)


def _text(cache: ComposedCache | None, index: int, past: int) -> EncodedText:
    """Return the text that augmenter `index` has read so far. Raises ValueError if the cache does not hold it."""
    text = EncodedText.of(None if cache is None else cache.texts[index], past)
    if text is None:
        expected = f"a cache that holds the {past} tokens that augmenter {index} has read"
        raise bad_value(WHERE, "cache", expected, "another one. Pass a new cache and all tokens")
    return text


def _read_text(
    encoder: Encoder,
    aligner: WholeReader | None,
    text: EncodedText,
    rows: list[list[int]],
    real: list[list[bool]] | None,
    ends: Any,
    device: torch.device,
) -> tuple[Reading, _Grown]:
    """Return what an augmenter reads when its text goes on with new tokens, and how the text grows."""
    past, new, batch = text.get_seq_length(), len(rows[0]), len(rows)
    prompt = text.prompt if ends is None else ends
    if prompt is None:
        prompt = (new,) if past == 0 else ()
    before = text.rows or [[] for _ in rows]
    old = text.points or [[] for _ in rows]
    shown, points = [], []
    for r, ids in enumerate(rows):
        own = prompt[r] if isinstance(prompt, list) else prompt
        shown.append(shown_tokens(before[r], ids, None if real is None else real[r], own, text.stops))
        points.append(reading_points(old[r], shown[r], past, own, encoder.mode == "reencode"))
    stale = text.spans is None and any(old)
    if not stale and not any(points):
        spans = text.spans or [(0, 0)] * batch
        found = [[spans[r] if token is not None else (0, 0) for token in shown[r]] for r in range(batch)]
        lo, hi = _bounds(found, device)
        nothing = torch.zeros(batch, 0, dtype=torch.int64)
        reading = Reading([], nothing[:1], nothing, lo, hi, aligner is not None, False)
        return reading, _Grown(shown, points, prompt, spans, text.slots)
    needed = [_needed(old[r], points[r], shown[r], past) for r in range(batch)]
    texts, places = _texts(aligner, before, shown, needed)
    layout = [_layout(needed[r], places[r], texts) for r in range(batch)]
    found = [
        [_span(layout[r], past + i) if token is not None else (0, 0) for i, token in enumerate(shown[r])]
        for r in range(batch)
    ]
    lo, hi = _bounds(found, device)
    index = _index(texts, places)
    tokens = torch.tensor([[token for one in texts for token in one]], dtype=torch.int64)
    last = [_span(layout[r], past + new) for r in range(batch)]
    grown = _Grown(shown, points, prompt, last, index.shape[1])
    return Reading(texts, tokens, index, lo, hi, aligner is not None, True), grown


@torch.compiler.disable(reason=_NO_GRAPH)
def source_reading(aligner: WholeReader | None, ids: torch.Tensor, mask: torch.Tensor | None, own: bool) -> Reading:
    """Return what a bidirectional augmenter reads of the source of an encoder-decoder: each row in full, for all.

    ids (B, N), mask (B, N) or None: the anchor's, or the augmenter's own, which no aligner reads. lo and hi of the
    result are (B, 1), the same for every token of the decoder.

    Raises ValueError for ids that cannot be read.
    """
    if torch.compiler.is_compiling():
        raise ValueError(f"{WHERE}: torch.export cannot trace this call, because {_NO_GRAPH}")
    _check_readable(ids)
    rows, real = on_host(ids, mask, 0)
    shown = [
        [token if real is None or real[r][i] else None for i, token in enumerate(row)] for r, row in enumerate(rows)
    ]
    needed = [[len(row) - 1] for row in rows]
    texts, places = _texts(None if own else aligner, [[] for _ in rows], shown, needed)
    lo, hi = _bounds([[(0, len(texts[place]))] for (place,) in places], ids.device)
    tokens = torch.tensor([[token for one in texts for token in one]], dtype=torch.int64)
    return Reading(texts, tokens, _index(texts, places), lo, hi, own or aligner is not None, True)


def _check_readable(ids: torch.Tensor) -> None:
    """Raise ValueError for ids whose values cannot be read on the host."""
    if ids.is_meta or active_transform() is not None:
        expected = "a tensor whose values can be read, because an augmenter is bidirectional"
        raise bad_value(WHERE, "input_ids", expected, "one of a meta device or of torch.func")


def _texts(
    aligner: WholeReader | None,
    before: Sequence[Sequence[int | None]],
    shown: Sequence[Sequence[int | None]],
    needed: list[list[int]],
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the augmenter's ids of every different text, and the texts of each row's reading points."""
    texts: list[list[int]] = []
    known: dict[tuple[int, ...], int] = {}  # beams and samples begin with equal rows
    places: list[list[int]] = []
    for old, new, points in zip(before, shown, needed, strict=True):
        row, own = [*old, *new], []
        for point in points:
            tokens = tuple(token for token in row[: point + 1] if token is not None)
            if tokens not in known:
                known[tokens] = len(texts)
                texts.append(list(tokens) if aligner is None else aligner.whole(tokens))
            own.append(known[tokens])
        places.append(own)
    return texts, places


def _needed(old: list[int], points: list[int], shown: list[int | None], past: int) -> list[int]:
    """Return the reading points whose encodings the slots must hold: the earlier one only if a new token reads it."""
    early = shown[: points[0] - past] if points else None
    return points if early is not None and all(token is None for token in early) else [*old[-1:], *points]


def _layout(points: list[int], places: list[int], texts: list[list[int]]) -> list[tuple[int, Span]]:
    """Return the slots of each reading point of a row, whose encodings follow one another."""
    found, start = [], 0
    for point, place in zip(points, places, strict=True):
        end = start + len(texts[place])
        found.append((point, (start, end)))
        start = end
    return found


def _span(layout: list[tuple[int, Span]], column: int) -> Span:
    """Return the slots that the token in `column` reads: those of the last reading point up to it."""
    return next((span for point, span in reversed(layout) if point <= column), (0, 0))


def _bounds(found: list[list[Span]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.tensor(found, dtype=torch.int32).to(device)
    return both[..., 0], both[..., 1]


def _index(texts: list[list[int]], places: list[list[int]]) -> torch.Tensor:
    """Return for every slot of a row the token that it holds, among those of all texts; 0 behind the last one."""
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(text))
    rows = [[i for place in own for i in range(starts[place], starts[place + 1])] for own in places]
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), width)


def _chunks(lengths: list[int], mixed: bool) -> list[tuple[int, int]]:
    """Return where the batches of texts begin and end. mixed: texts of different lengths may be in one."""
    found: list[tuple[int, int]] = []
    for place, length in enumerate(lengths):
        start = found[-1][0] if found else 0
        if found and place - start < CHUNK and (mixed or length == lengths[start]):
            found[-1] = (start, place + 1)
        else:
            found.append((place, place + 1))
    return found


@torch.compiler.disable(reason=_NO_GRAPH)
def run_encoder(
    frame: Frame,
    index: int,
    model: PreTrainedModel,
    called: nn.Module,
    encoder: Encoder,
    reading: Reading,
    keys: list[tuple[int, int]],
    device: torch.device,
) -> None:
    """Run `called`, the module inside augmenter `index` that has its layers, on the texts of a call.

    Leaves the states (B, N, DA) of its connected layers, `keys`, in the frame. device: of the augmenter.

    Raises ValueError for a text that is longer than the augmenter's learned positions reach.
    """
    texts = [text for text in reading.texts if text]
    longest = max(map(len, texts), default=0)
    if encoder.longest is not None and longest > encoder.longest:
        expected = f"of at most {encoder.longest} tokens for augmenter {index} ({type(model).__name__}) where it reads"
        got = f"{longest}. Shorten the prompt, or compose an encoder that reads more"
        raise bad_value(WHERE, "input_ids", expected, got)
    states: dict[tuple[int, int], list[torch.Tensor]] = {key: [] for key in keys}
    for start, end in _chunks([len(text) for text in texts], bool(encoder.padded)):
        chunk = texts[start:end]
        width = max(map(len, chunk))
        ids = torch.tensor([text + [encoder.pad] * (width - len(text)) for text in chunk])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in chunk])
        real = torch.tensor([r * width + i for r, text in enumerate(chunk) for i in range(len(text))])
        called(**encoder.inputs(ids.to(device), mask.to(device)))
        for key in keys:
            if key in frame.states:  # Hooks.check_read names a layer that did not run
                state = frame.states.pop(key)
                states[key].append(state.flatten(0, 1)[real.to(state.device)])
    for key, parts in states.items():
        if parts:
            frame.states[key] = torch.cat(parts)[reading.places.to(parts[0].device)]
