"""One call of a composed model whose augmenters have other tokenizers: their ids and intervals, read off the anchor's.

The ids of the call are read on the host. Nothing of this runs for augmenters that read the anchor's ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from calm_fast.core.checks import bad_value, describe
from calm_fast.core.dispatch import active_transform
from calm_fast.hf.aligned_text import AlignedText, Aligner, Point, RowText
from calm_fast.hf.cache import ComposedCache
from calm_fast.hf.masks import WHERE, check_shape, refuse_restarts

OWN = ("augmenter_input_ids", "augmenter_attention_mask", "augmenter_position_ids", "lo", "hi")
_NO_GRAPH = (
    "an augmenter with another tokenizer needs the ids on the host; pass `augmenter_input_ids` and `hi` "
    "(calm_fast.hf.AlignedCollator makes them), which compile"
)


class _Read(NamedTuple):
    """What one augmenter reads in a call: ids (B, N), mask (B, slots + N) or None, hi (B, M), and the new points."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    hi: torch.Tensor
    points: list[list[Point]]
    prompt: Any


class AlignedCall:
    """The ids of every aligned augmenter in one call; `commit` puts the aligners' states into the cache."""

    def __init__(self, reads: dict[int, _Read], texts: dict[int, AlignedText]) -> None:
        self.reads, self.texts = reads, texts

    def commit(self, cache: ComposedCache) -> None:
        """Go on with the texts of `cache`."""
        for index, read in self.reads.items():
            text = cache.texts[index] = self.texts[index]
            text.prompt = read.prompt
            text.slots += read.ids.shape[1]
            if text.rows:
                for row, points in zip(text.rows, read.points, strict=True):
                    row.extend(points)
            else:
                text.rows = read.points


def align_call(
    aligners: Sequence[Aligner | None],
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    external: dict[str, Any],
    cache: ComposedCache | None,
    cached: bool | None,
    past: int,
    prompt_length: Any,
) -> AlignedCall:
    """Write into `external` what each augmenter with an aligner reads in this call; given ids win.

    ids (B, M), mask (B, past + M), positions: the anchor's. external: the arguments of `augmenter_calls`. cached: False
    if no cache is kept. prompt_length: see `ComposedForCausalLM.forward`.

    Raises ValueError for arguments about an augmenter's own tokens without the tokens, for rows of several documents,
    and for ids that cannot be read.
    """
    lists = {name: listed(value, len(aligners)) for name, value in external.items()}
    own = lists["augmenter_input_ids"]
    wanted = {i: one for i, one in enumerate(aligners) if one is not None and own[i] is None}
    if cache is not None:
        for index in range(len(aligners)):
            if own[index] is not None:
                cache.texts[index] = None  # the caller's ids go on from here
    if not wanted:
        return AlignedCall({}, {})
    _check_call(mask is None and cache is None, ids, positions, lists, list(wanted))
    reads, texts = _read(wanted, ids, mask, cache, cached, past, prompt_length)
    for index, read in reads.items():
        for name, value in zip(OWN, (read.ids, read.mask, None, None, read.hi), strict=True):
            lists[name][index] = value
    external.update(lists)
    return AlignedCall(reads, texts)


@torch.compiler.disable(reason=_NO_GRAPH)
def _read(
    aligners: dict[int, Aligner],
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    cache: ComposedCache | None,
    cached: bool | None,
    past: int,
    prompt_length: Any,
) -> tuple[dict[int, _Read], dict[int, AlignedText]]:
    """Return what every aligned augmenter reads, and the texts that this goes on."""
    if torch.compiler.is_compiling():
        raise ValueError(f"{WHERE}: torch.export cannot trace this call, because {_NO_GRAPH}")
    batch, new = ids.shape
    if mask is not None:
        check_shape("attention_mask", mask, batch, past, new)
    rows, real = on_host(ids, mask, past)
    ends = prompt_ends(prompt_length, batch)
    reads: dict[int, _Read] = {}
    texts: dict[int, AlignedText] = {}
    for index, aligner in aligners.items():
        text = texts[index] = _text(cache, index, past)
        check_rows(text, batch)
        if cached is False:
            reads[index] = _read_whole(aligner, rows, real, ends, ids.device)
        else:
            reads[index] = _read_on(aligner, text, rows, real, ends, ids.device)
    return reads, texts


def check_rows(text: RowText, batch: int) -> None:
    """Raise ValueError unless a call has as many rows as the cached text."""
    if text.rows and len(text.rows) != batch:
        got = f"{batch}. Repeat the cache's rows for beams or samples: cache.batch_repeat_interleave(n)"
        raise bad_value(WHERE, "input_ids", f"of {len(text.rows)} rows, as many as the cache has", got)


def listed(value: Any, count: int) -> list[Any]:
    """Return an argument as a list with an entry per augmenter."""
    if isinstance(value, (list, tuple)):
        return list(value) if len(value) == count else [value] * count  # augmenter_calls refuses another length
    return [value] * count


def _check_call(
    packable: bool,
    ids: torch.Tensor,
    positions: torch.Tensor | None,
    lists: dict[str, list[Any]],
    wanted: list[int],
) -> None:
    """Raise ValueError as `align_call` does. packable: True if restarting positions would separate documents."""
    for name in OWN[1:]:
        if any(lists[name][index] is not None for index in wanted):
            got = "a value. Pass `augmenter_input_ids` too, or leave both out: the model aligns the tokens itself"
            raise bad_value(WHERE, name, "None for an augmenter with another tokenizer whose ids are not given", got)
    if ids.is_meta or active_transform() is not None:
        got = "None, and the ids cannot be read here (meta tensors, torch.func). Pass them, with `hi`"
        raise bad_value(WHERE, "augmenter_input_ids", "given for an augmenter with another tokenizer", got)
    if packable and positions is not None and positions.ndim == 2:
        refuse_restarts(positions, str(_packed()))


def _packed() -> ValueError:
    expected = "given for rows of several documents if an augmenter has another tokenizer"
    got = "None. calm_fast.hf.AlignedCollator packs documents, or pass one document per row"
    return bad_value(WHERE, "augmenter_input_ids", expected, got)


def _text(cache: ComposedCache | None, index: int, past: int) -> AlignedText:
    """Return the text that augmenter `index` has read so far. Raises ValueError if the cache does not hold it."""
    text = AlignedText.of(None if cache is None else cache.texts[index], past)
    if text is None:
        expected = f"given in every call with this cache, because augmenter {index} has read tokens of its own"
        raise bad_value(WHERE, "augmenter_input_ids", expected, "None. Pass its new tokens, with `hi`")
    return text


def on_host(ids: torch.Tensor, mask: torch.Tensor | None, past: int) -> tuple[list[list[int]], list[list[bool]] | None]:
    """Return the ids and, if some of them are padding, which are real: one synchronisation of a GPU."""
    if mask is None:
        return ids.tolist(), None
    new = mask[:, past:].to(device=ids.device, dtype=ids.dtype)
    rows, real = torch.stack((ids, new)).tolist()
    full = all(all(row) for row in real)
    return rows, None if full else [[bool(value) for value in row] for row in real]


def prompt_ends(prompt_length: Any, batch: int | None = None) -> Any:
    """Return where prompts end, as `AlignedText.prompt` keeps it; None if the call does not say."""
    rows = "batch" if batch is None else batch
    expected = f"None, a number of tokens, or an integer tensor ({rows},) or ({rows}, prompts of a row)"
    if prompt_length is None:
        return None
    if isinstance(prompt_length, torch.Tensor) and prompt_length.ndim > 0:
        fits = prompt_length.ndim in (1, 2) and batch in (None, len(prompt_length)) and prompt_length.numel() > 0
        if not fits or prompt_length.is_floating_point() or prompt_length.dtype == torch.bool:
            raise bad_value(WHERE, "prompt_length", expected, describe(prompt_length))
        values = prompt_length.reshape(len(prompt_length), -1).tolist()
        if any(value < 0 for row in values for value in row):
            raise bad_value(WHERE, "prompt_length", "at least 0", str(values))
        return [tuple(row) for row in values]
    if isinstance(prompt_length, torch.Tensor):
        prompt_length = prompt_length.item()
    if isinstance(prompt_length, bool) or not isinstance(prompt_length, int) or prompt_length < 0:
        raise bad_value(WHERE, "prompt_length", expected, describe(prompt_length))
    return (prompt_length,)


def _read_row(
    aligner: Aligner,
    point: Point,
    ids: Sequence[int],
    real: Sequence[bool] | None,
    past: int,
    ends: tuple[int, ...],
    stops: frozenset[int],
) -> tuple[list[Point], list[int]]:
    """Return (the points after every new token of a row, the augmenter's new ids).

    A prompt that ends in this call is flushed after its last real token.
    """
    flushes = set()
    for end in ends:
        if past < end <= past + len(ids):
            column = end - past - 1
            while real is not None and column > 0 and not real[column]:
                column -= 1
            flushes.add(column)
    generated = max(ends, default=0)  # tokens from here on were chosen by the model
    (state, before, ended), found = point, list[int]()
    points = []
    for i, token in enumerate(ids):
        ended = ended and past + i >= generated
        if not ended and (real is None or real[i]):
            state, new = aligner.step(aligner.start() if state is None else state, token)
            found += new
            ended = token in stops and past + i >= generated
        if i in flushes and state is not None:
            state, new = aligner.finish(state)
            found += new
        points.append(Point(state, before + len(found), ended))
    return points, found


def _read_on(
    aligner: Aligner,
    text: AlignedText,
    rows: list[list[int]],
    real: list[list[bool]] | None,
    ends: Any,
    device: torch.device,
) -> _Read:
    """Read the new tokens of every row after those of `text`."""
    past, slots = text.get_seq_length(), text.slots
    prompt = text.prompt if ends is None else ends
    if prompt is None:
        prompt = (len(rows[0]),) if past == 0 else ()
    known: dict[Any, tuple[list[Point], list[int]]] = {}
    points, found, hi = [], [], []
    for r, ids in enumerate(rows):
        shown = None if real is None else real[r]
        last = text.rows[r][-1] if past else Point()
        own = prompt[r] if isinstance(prompt, list) else prompt
        # beams and samples begin with equal rows
        key = None if past else (tuple(ids), None if shown is None else tuple(shown), own)
        result = known.get(key) if key is not None else None
        if result is None:
            result = _read_row(aligner, last, ids, shown, past, own, text.stops)
            if key is not None:
                known[key] = result
        points.append(result[0].copy())
        found.append(result[1])
        hi.append([
            slots + p.count - last.count if shown is None or shown[i] else 0 for i, p in enumerate(result[0])
        ])  # fmt: skip
    before = text.counts() if past else [0] * len(rows)
    new, mask = _padded(found, before, slots, device)
    return _Read(new, mask, torch.tensor(hi, dtype=torch.int32).to(device), points, prompt)


def _read_whole(
    aligner: Aligner, rows: list[list[int]], real: list[list[bool]] | None, ends: Any, device: torch.device
) -> _Read:
    """Read whole rows of which nothing will go on."""
    columns = len(rows[0])
    kept = [[i for i in range(columns) if real is None or real[r][i]] for r in range(len(rows))]
    several = isinstance(ends, list) and len(ends[0]) > 1
    if several:
        read = [_read_row(aligner, Point(), ids, None if real is None else real[r], 0, ends[r], frozenset())
                for r, ids in enumerate(rows)]  # fmt: skip
        found = [new for _, new in read]
        hi = [[points[i].count if real is None or real[r][i] else 0 for i in range(columns)]
              for r, (points, _) in enumerate(read)]  # fmt: skip
    else:
        lengths: list[int | None] = []
        for r, columns_of_row in enumerate(kept):
            end = columns if ends is None else (ends[r] if isinstance(ends, list) else ends)[0]
            reached = 0 < end <= columns
            lengths.append((sum(i < end for i in columns_of_row) or None) if reached else None)
        texts = [[ids[i] for i in kept[r]] for r, ids in enumerate(rows)]
        aligned = aligner.align_batch(texts, lengths)
        found = [new for new, _ in aligned]
        hi = [[0] * columns for _ in rows]
        for r, (_, bounds) in enumerate(aligned):
            for i, bound in zip(kept[r], bounds, strict=True):
                hi[r][i] = bound
    ids, mask = _padded(found, [0] * len(rows), 0, device)
    return _Read(ids, mask, torch.tensor(hi, dtype=torch.int32).to(device), [], None)


def _padded(
    found: list[list[int]], before: list[int], slots: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (new ids (B, N), padded on the right; mask (B, slots + N) or None if every slot holds a real id).

    before: the number of earlier ids of each row; they fill the last of the `slots`.
    """
    most = max(map(len, found))
    ids = torch.tensor([new + [0] * (most - len(new)) for new in found], dtype=torch.int64).reshape(len(found), most)
    if all(len(new) == most for new in found) and all(count == slots for count in before):
        return ids.to(device), None
    # the mask stays on the host, where `own_step` reads it and drops padding that all rows share
    index = torch.arange(slots + most)
    first = torch.tensor([[slots - count] for count in before])
    end = torch.tensor([[slots + len(new)] for new in found])
    return ids.to(device), ((index >= first) & (index < end)).long()
