"""maj_at_k from torch's own ops: exact curves by products of polynomials, resampled ones many shuffles at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from calm_fast._ops.vote.torch_impl import class_columns, column_sums
from calm_fast._ops.voting.torch_impl import TIED, sample_weights

# up to so many samples one tilt serves every k: 2^-1000 is still a normal float64
_ONE_TILT = 1000
# float64 numbers a pass works on: the CPU's cache, the GPU's width
_CHUNK = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 24


def maj_at_k_torch(
    answers: torch.Tensor,
    correct: torch.Tensor,
    scores: torch.Tensor | None,
    valid: torch.Tensor | None,
    ks: list[int],
    method: str,
    resamples: int,
    rule: str,
    lam: float,
    seed: int,
) -> torch.Tensor:
    """Credit (Q, len(ks)) float64 as `maj_at_k_reference` defines it; docs/ops/maj_at_k.md has the derivation."""
    q = answers.shape[0]
    if not answers.numel():
        return torch.zeros(q, len(ks), dtype=torch.float64, device=answers.device)
    columns, width = class_columns(answers, valid)
    n = (columns < width).sum(1)
    hits = (answers == correct.unsqueeze(1)) & (columns < width)
    first = hits.to(torch.uint8).argmax(1, keepdim=True)
    right = torch.where(hits.any(1), columns.gather(1, first).squeeze(1), width)  # `width` where nobody has it
    weights = sample_weights(answers, scores, valid, rule, lam)
    credit = _whole(columns, weights, right, width).unsqueeze(1).repeat(1, len(ks))
    if method == "resample":
        weights = None if rule == "count" else weights
        _resampled(credit, columns, weights, n, right, width, ks, resamples, seed)
        return credit
    counts = column_sums(columns, weights, width).long()
    counts[:, width] = 0  # of the samples that do not vote
    c = hits.sum(1)
    others = counts.scatter(1, right.unsqueeze(1), 0).sort(1, descending=True).values
    for rows, tilt, sizes in _groups(n, ks):
        found = exact_credit(c[rows], others[rows], n[rows], sizes, tilt)
        for at, k in enumerate(ks):
            if k in sizes:
                credit[rows, at] = torch.where(n[rows] > k, found[:, sizes.index(k)], credit[rows, at])
    return credit


def _whole(columns: torch.Tensor, weights: torch.Tensor, right: torch.Tensor, width: int) -> torch.Tensor:
    """Credit (Q,) of all of a question's valid samples together: what every k >= n gets."""
    sums = column_sums(columns, weights, width)
    opened = torch.zeros_like(sums, dtype=torch.bool).scatter_(1, columns, True)
    return _tie_credit(sums.masked_fill_(~opened, -torch.inf)[:, :width], right)


def _tie_credit(sums: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """1 / ties where the right column is tied at the top of sums (..., C), -inf for empty classes; else 0."""
    top = sums.amax(-1, keepdim=True)
    tied = (top - sums <= TIED) & (sums > -torch.inf)
    width = sums.shape[-1]
    won = tied.gather(-1, right.clamp(max=width - 1).unsqueeze(-1)).squeeze(-1) & (right < width)
    return won.double() / tied.sum(-1).clamp(min=1)


# ---- exact ----------------------------------------------------------------------------------------------------------


def _groups(n: torch.Tensor, ks: list[int]) -> Iterator[tuple[torch.Tensor, float, list[int]]]:
    """(questions, tilt, sizes below n): what one pass of `exact_credit` can serve."""
    sizes = sorted({k for k in ks if k < int(n.max())})
    few = (n <= _ONE_TILT).nonzero().squeeze(1)
    if few.numel() and (own := [k for k in sizes if k < int(n[few].max())]):
        yield few, 0.5, own
    for count in n[n > _ONE_TILT].unique().tolist():
        for k in sizes:
            if k < count:
                yield (n == count).nonzero().squeeze(1), k / count, [k]


def exact_credit(
    c: torch.Tensor, others: torch.Tensor, n: torch.Tensor, ks: list[int], tilt: float = 0.5
) -> torch.Tensor:
    """Expected credit (Q, len(ks)) over all subsets of size k < n (meaningless where k >= n).

    Every class is weighted with binomial probabilities of the same parameter `tilt`; given the total they are the
    hypergeometric ones whatever the tilt, so it is chosen for the range of float64 alone. All terms are positive.

    Args:
        c: (Q,) samples of the right class. others: (Q, C) those of the others, largest first. n: (Q,) all samples.
    """
    longest, device = max(ks), c.device
    table = binomial_table(int(n.max()), longest, tilt, device)
    total = c.new_zeros((c.shape[0], len(ks)), dtype=torch.float64)
    chunk = _CHUNK.get(device.type, _CHUNK_ELSEWHERE)
    for w in range(1, min(int(c.max()), longest) + 1):
        rows = (c >= w).nonzero().squeeze(1)
        # a class that cannot exceed w is not held back: all of those are one class of their joint size
        large = (others[rows] >= w).sum(1)
        large, order = large.sort(descending=True)
        rows = rows[order]
        size = longest - w + 1
        begin = 0
        while begin < rows.numel():
            nodes = min(int(large[begin]), (longest - w) // w) // 2 + 1
            here = slice(begin, begin + max(1, chunk // (nodes * size)))
            part, held = rows[here], large[here]
            ways = _held_back(others[part], held, w, size, nodes, table)
            rest = n[part] - c[part] - others[part].masked_fill(others[part] < w, 0).sum(1)
            free, won = table[rest], table[c[part], w]
            for at, k in enumerate(ks):
                if k >= w:
                    total[part, at] += won * (ways[:, : k - w + 1] * free[:, : k - w + 1].flip(1)).sum(1)
            begin = here.stop
    return total / table[n][:, ks]


def _held_back(
    others: torch.Tensor, held: torch.Tensor, w: int, size: int, nodes: int, table: torch.Tensor
) -> torch.Tensor:
    """(rows, size): coefficients of the integral over x in [0, 1] of the product of

        sum_{i < w} b(count, i) z^i + x b(count, w) z^w       over the first held[row] classes of others[row]

    x marks a class tied at w, and the integral of x^t is the tie's credit 1 / (1 + t).
    """
    x, share = (t.to(others.device) for t in quadrature(nodes))
    product = table.new_zeros(others.shape[0], nodes, size)
    product[..., 0] = 1.0
    for j in range(int(held[0])):
        rows = int((held > j).sum())  # those come first
        factor, new = table[others[:rows, j], : w + 1], product[:rows]
        if j == 0:  # times 1
            new[..., : w + 1] = factor[:, None, :size]
            if w < size:
                new[..., w] *= x
            continue
        reach = min(size, j * w + 1)  # degree so far, plus 1
        old = new[..., :reach].clone()
        new[..., :reach].mul_(factor[:, None, :1])
        for i in range(1, min(w, size - 1) + 1):
            b = factor[:, None, i : i + 1]
            new[..., i : i + reach].addcmul_(old[..., : size - i], b * x[:, None] if i == w else b)
    return torch.einsum("rms,m->rs", product, share)


@functools.lru_cache(maxsize=64)
def quadrature(nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1] (float64): exact for polynomials of degree 2 nodes - 1."""
    i = torch.arange(1, nodes, dtype=torch.float64)
    off = i / (4 * i * i - 1).sqrt()
    x, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (x + 1) / 2, vectors[0].square()


def binomial_table(most: int, longest: int, p: float, device: torch.device) -> torch.Tensor:
    """(most + 1, longest + 1) float64: C(n, i) p^i (1 - p)^(n - i), by Pascal's rule."""
    table = torch.zeros(most + 1, longest + 1, dtype=torch.float64)
    table[0, 0] = 1.0
    for n in range(1, most + 1):
        table[n] = table[n - 1] * (1 - p)
        table[n, 1:] += table[n - 1, :-1] * p
    return table.to(device)


# ---- resample -------------------------------------------------------------------------------------------------------


def _resampled(
    credit: torch.Tensor,
    columns: torch.Tensor,
    weights: torch.Tensor | None,
    n: torch.Tensor,
    right: torch.Tensor,
    width: int,
    ks: list[int],
    resamples: int,
    seed: int,
) -> None:
    """Overwrite credit (Q, len(ks)) where k < n by the mean over shuffles; no draw is made beyond those k."""
    sizes = sorted({k for k in ks if k < int(n.max())})
    if not sizes:
        return
    order = (columns == width).sort(dim=1, stable=True).indices  # the valid samples first, in their order
    columns = columns.gather(1, order)
    weights = None if weights is None else weights.gather(1, order)
    chunk = max(1, _CHUNK.get(columns.device.type, _CHUNK_ELSEWHERE) // max(columns.shape[1], width))
    step = min(resamples, chunk)
    wide = max(1, chunk // step)
    for begin in range(0, columns.shape[0], wide):
        rows = slice(begin, begin + wide)
        found = credit.new_zeros(len(sizes), credit[rows].shape[0])
        own = (columns[rows], None if weights is None else weights[rows], n[rows], right[rows], width, sizes)
        for first in range(0, resamples, step):
            found += _shuffled(*own, range(first, min(first + step, resamples)), seed, begin)
        for at, k in enumerate(ks):
            if k in sizes:
                mean = found[sizes.index(k)] / resamples
                credit[rows, at] = torch.where(n[rows] > k, mean, credit[rows, at])


def _shuffled(
    columns: torch.Tensor,
    weights: torch.Tensor | None,
    n: torch.Tensor,
    right: torch.Tensor,
    width: int,
    sizes: list[int],
    resamples: range,
    seed: int,
    first_question: int,
) -> torch.Tensor:
    """Sum of credits (len(sizes), Q) over `resamples`: the reference's shuffles, Q times len(resamples) at once."""
    (q, samples), device = columns.shape, columns.device
    many = (q, len(resamples))
    counted = weights is None
    # what is shuffled: places of samples, or where every sample counts 1 their columns themselves
    state = (columns if counted else torch.arange(samples, device=device)).view(-1, 1, samples)
    state = state.expand(*many, samples).clone(memory_format=torch.contiguous_format)
    # one column more, for draws beyond a question's samples
    sums = torch.zeros(*many, width + 1, dtype=torch.float64, device=device)
    ones = torch.ones(*many, 1, dtype=torch.float64, device=device)
    if not counted:
        columns, weights = (t.unsqueeze(1).expand(*many, samples) for t in (columns, weights))
        seen = torch.zeros_like(sums, dtype=torch.bool)
    right, n = right.unsqueeze(1).expand(many), n.unsqueeze(1)
    question = torch.arange(first_question, first_question + q, device=device).unsqueeze(1)
    resample = torch.arange(resamples.start, resamples.stop, device=device).unsqueeze(0)
    found = []
    for i in range(sizes[-1]):
        if i % 4 == 0:
            words = philox(seed, i // 4, resample, question)
        j = ((words[i % 4] * (n - i).clamp(min=0) >> 32) + i).unsqueeze(-1)
        column = drawn = state.gather(-1, j)
        state.scatter_(-1, j, state[..., i : i + 1].clone())
        if not counted:
            column = columns.gather(-1, drawn)
            seen.scatter_(-1, column, True)
        sums.scatter_add_(-1, column, ones if counted else weights.gather(-1, drawn))
        if i + 1 in sizes:
            present = sums > 0 if counted else seen
            found.append(_tie_credit(sums.masked_fill(~present, -torch.inf)[..., :width], right).sum(1))
    return torch.stack(found)


def philox(
    seed: int, block: int, resample: torch.Tensor, question: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 of the counters (block, resample, question, 0), broadcast: four int64 tensors of 32-bit words."""
    low = 0xFFFFFFFF
    key0, key1 = seed & low, seed >> 32 & low
    x0, x1, x2, x3 = torch.full_like(question, block), resample, question, torch.zeros_like(question)
    for _ in range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # modulo 2^64: the bits are right, the sign is not
        x0, x1 = (product1 >> 32 & low) ^ x1 ^ key0, product1 & low
        x2, x3 = (product0 >> 32 & low) ^ x3 ^ key1, product0 & low
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    return x0, x1, x2, x3
