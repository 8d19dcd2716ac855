"""maj_at_k from torch's own ops: exact curves by products of polynomials, resampled curves by many shuffles at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from calm_fast._ops.vote.torch_impl import class_columns, column_sums
from calm_fast._ops.voting.torch_impl import sample_weights, tie_limit, voting_samples

# most samples for which one tilt serves every k: 2^-1000 is still a normal float64
_ONE_TILT = 1000
# float64 numbers that a pass works on: they fit the cache of a CPU, or fill a GPU
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
    """Return the credit (Q, len(ks)) float64 that `maj_at_k_reference` defines; docs/ops/maj_at_k.md derives it."""
    q = answers.shape[0]
    if not answers.numel():
        return torch.zeros(q, len(ks), dtype=torch.float64, device=answers.device)
    valid = voting_samples(answers, valid)
    columns, width = class_columns(answers, valid)
    n = (columns < width).sum(1)
    hits = (answers == correct.unsqueeze(1)) & (columns < width)
    first = hits.to(torch.uint8).argmax(1, keepdim=True)
    right = torch.where(hits.any(1), columns.gather(1, first).squeeze(1), width)  # `width` if no sample has it
    weights = sample_weights(answers, scores, valid, rule, lam)
    credit = _credit_of_all(columns, weights, right, width).unsqueeze(1).repeat(1, len(ks))
    if method == "resample":
        own_weights = None if rule == "count" else weights
        _write_resampled_credit(credit, columns, own_weights, n, right, width, ks, resamples, seed)
        return credit
    counts = column_sums(columns, weights, width).long()
    counts[:, width] = 0  # samples that do not vote
    c = hits.sum(1)
    others = counts.scatter(1, right.unsqueeze(1), 0).sort(1, descending=True).values
    for rows, tilt, sizes in _groups(n, ks):
        found = exact_credit(c[rows], others[rows], n[rows], sizes, tilt)
        for at, k in enumerate(ks):
            if k in sizes:
                credit[rows, at] = torch.where(n[rows] > k, found[:, sizes.index(k)], credit[rows, at])
    return credit


def _credit_of_all(columns: torch.Tensor, weights: torch.Tensor, right: torch.Tensor, width: int) -> torch.Tensor:
    """Return the credit (Q,) of a vote of all valid samples, which holds for every k >= n."""
    sums = column_sums(columns, weights, width)
    opened = torch.zeros_like(sums, dtype=torch.bool).scatter_(1, columns, True)
    return _tie_credit(sums.masked_fill_(~opened, -torch.inf)[:, :width], right)


def _tie_credit(sums: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return 1 / ties if the right column is tied at the top of sums (..., C), else 0; an empty class has sum -inf."""
    top = sums.amax(-1, keepdim=True)
    tied = (sums >= tie_limit(top)) & (sums > -torch.inf)
    width = sums.shape[-1]
    won = tied.gather(-1, right.clamp(max=width - 1).unsqueeze(-1)).squeeze(-1) & (right < width)
    return won.double() / tied.sum(-1).clamp(min=1)


# ---- exact ----------------------------------------------------------------------------------------------------------


def _groups(n: torch.Tensor, ks: list[int]) -> Iterator[tuple[torch.Tensor, float, list[int]]]:
    """Yield (questions, tilt, sizes below n) for each pass of `exact_credit`."""
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
    """Return the expected credit (Q, len(ks)) over all subsets of size k < n; it is meaningless where k >= n.

    Every class is weighted with binomial probabilities of the same parameter `tilt`. Given the total they are the
    hypergeometric probabilities for any tilt, so it is chosen for the range of float64 alone. All terms are positive.

    Args:
        c: (Q,) samples of the right class. others: (Q, C) samples of the other classes, largest first.
        n: (Q,) all samples.
    """
    longest, device = max(ks), c.device
    table = binomial_table(int(n.max()), longest, tilt, device)
    total = c.new_zeros((c.shape[0], len(ks)), dtype=torch.float64)
    chunk = _CHUNK.get(device.type, _CHUNK_ELSEWHERE)
    for w in range(1, min(int(c.max()), longest) + 1):
        rows = (c >= w).nonzero().squeeze(1)
        # a class that cannot exceed w is unrestricted, and all such classes are one class of their joint size
        large = (others[rows] >= w).sum(1)
        large, order = large.sort(descending=True)
        rows = rows[order]
        size = longest - w + 1
        begin = 0
        while begin < rows.numel():
            nodes = min(int(large[begin]), (longest - w) // w) // 2 + 1
            here = slice(begin, begin + max(1, chunk // (nodes * size)))
            part, restricted = rows[here], large[here]
            ways = _restricted_product(others[part], restricted, w, size, nodes, table)
            rest = n[part] - c[part] - others[part].masked_fill(others[part] < w, 0).sum(1)
            free, won = table[rest], table[c[part], w]
            for at, k in enumerate(ks):
                if k >= w:
                    total[part, at] += won * (ways[:, : k - w + 1] * free[:, : k - w + 1].flip(1)).sum(1)
            begin = here.stop
    return total / table[n][:, ks]


def _restricted_product(
    others: torch.Tensor, restricted: torch.Tensor, w: int, size: int, nodes: int, table: torch.Tensor
) -> torch.Tensor:
    """Return (rows, size), the coefficients of the integral over x in [0, 1] of the product of

        sum_{i < w} b(count, i) z^i + x b(count, w) z^w       over the first restricted[row] classes of others[row]

    x marks a class tied at w, and the integral of x^t is the tie's credit 1 / (1 + t).
    """
    x, share = (t.to(others.device) for t in quadrature(nodes))
    product = table.new_zeros(others.shape[0], nodes, size)
    product[..., 0] = 1.0
    for j in range(int(restricted[0])):
        rows = int((restricted > j).sum())  # these rows come first
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
    """Return Gauss-Legendre nodes and weights on [0, 1] (float64), exact for polynomials of degree 2 nodes - 1."""
    i = torch.arange(1, nodes, dtype=torch.float64)
    off_diagonal = i / (4 * i * i - 1).sqrt()
    x, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return (x + 1) / 2, vectors[0].square()


def binomial_table(most: int, longest: int, p: float, device: torch.device) -> torch.Tensor:
    """Return (most + 1, longest + 1) float64, C(n, i) p^i (1 - p)^(n - i) by Pascal's rule."""
    table = torch.zeros(most + 1, longest + 1, dtype=torch.float64)
    table[0, 0] = 1.0
    for n in range(1, most + 1):
        table[n] = table[n - 1] * (1 - p)
        table[n, 1:] += table[n - 1, :-1] * p
    return table.to(device)


# ---- resample -------------------------------------------------------------------------------------------------------


def _write_resampled_credit(
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
    """Overwrite credit (Q, len(ks)) where k < n by the mean over shuffles; nothing is drawn beyond those k."""
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
            found += _shuffle_credit(*own, range(first, min(first + step, resamples)), seed, begin)
        for at, k in enumerate(ks):
            if k in sizes:
                mean = found[sizes.index(k)] / resamples
                credit[rows, at] = torch.where(n[rows] > k, mean, credit[rows, at])


def _shuffle_credit(
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
    """Return the sum of credits (len(sizes), Q) over `resamples`, from Q len(resamples) of the reference's shuffles."""
    (q, samples), device = columns.shape, columns.device
    many = (q, len(resamples))
    # shuffle the indices of samples, or their columns where every sample weighs 1
    state = (columns if weights is None else torch.arange(samples, device=device)).view(-1, 1, samples)
    state = state.expand(*many, samples).clone(memory_format=torch.contiguous_format)
    # one column more, for draws beyond a question's samples
    sums = torch.zeros(*many, width + 1, dtype=torch.float64, device=device)
    ones = torch.ones(*many, 1, dtype=torch.float64, device=device)
    seen = torch.zeros(sums.shape if weights is not None else (0,), dtype=torch.bool, device=device)
    if weights is not None:
        columns, weights = (t.unsqueeze(1).expand(*many, samples) for t in (columns, weights))
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
        if weights is None:
            sums.scatter_add_(-1, column, ones)
        else:
            column = columns.gather(-1, drawn)
            seen.scatter_(-1, column, True)
            sums.scatter_add_(-1, column, weights.gather(-1, drawn))
        if i + 1 in sizes:
            present = sums > 0 if weights is None else seen
            found.append(_tie_credit(sums.masked_fill(~present, -torch.inf)[..., :width], right).sum(1))
    return torch.stack(found)


def philox(
    seed: int, block: int, resample: torch.Tensor, question: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Philox4x32-10 of the broadcast counters (block, resample, question, 0) as four int64 tensors of words."""
    low = 0xFFFFFFFF
    key0, key1 = seed & low, seed >> 32 & low
    x0, x1, x2, x3 = torch.full_like(question, block), resample, question, torch.zeros_like(question)
    for _ in range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # modulo 2^64: the bits are right, the sign is not
        x0, x1 = (product1 >> 32 & low) ^ x1 ^ key0, product1 & low
        x2, x3 = (product0 >> 32 & low) ^ x3 ^ key1, product0 & low
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    return x0, x1, x2, x3
