"""Cases and mutations of each op with a CUDA kernel, for the tests of the emulation. A new op adds an entry to each.

EXTRA: cases besides those of `calm-fast verify`, so that every path of the launch plan runs.
FEW: the cases that a mutant is run on: few and small, and together reaching every barrier.
WRONG: (old, new) texts in the op's device code; each is a wrong index or a wrong guard that must be found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from calm_fast.core.numerics import Case
from calm_fast.verify import emulation
from calm_fast.verify.cases import op_cases

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16


def emulated_ops() -> list[str]:
    """Return every op with a csrc/<op>/<part>_emulated.cpp."""
    return sorted(path.parent.name for path in emulation.CSRC.glob("*/*_emulated.cpp"))


def _vote(name: str, **changes: object) -> Case:
    return op_cases("vote").case(name, _F32, **changes)


def _maj_at_k(name: str, **changes: object) -> Case:
    return op_cases("maj_at_k").case(name, _F32, **changes)


def _attention(name: str, dtype: torch.dtype = _F32, **changes: object) -> Case:
    return op_cases("cross_attention").case(name, dtype, **changes)


def _dual_lora(name: str, dtype: torch.dtype = _F32, **changes: object) -> Case:
    return op_cases("dual_lora").case(name, dtype, **changes)


EXTRA: dict[str, Callable[[], list[Case]]] = {
    "vote": lambda: [
        _vote("count", q=3, k=256),  # the largest K for a warp; 257 is the smallest for a block
        _vote("count", q=3, k=257),
        _vote("weighted", q=3, k=4500, classes=3, unscored=0.1, invalid=0.1),  # does not fit into shared memory
        _vote("count", q=2, k=6500, classes=3),
    ],
    "maj_at_k": lambda: [
        _maj_at_k("adaptive", q=2, resamples=300, k=40, classes=7, ks=(1, 3, 40)),  # several blocks per question
        _maj_at_k("weighted", q=2, resamples=70, k=120, classes=9, ks=(1, 30)),  # 64 threads
        _maj_at_k("resample", q=2, resamples=40, k=600, classes=3, ks=(1, 3)),  # 32 threads
        _maj_at_k("resample", q=2, resamples=40, k=800, classes=3, ks=(1, 3)),  # scratch, counts
        _maj_at_k("weighted", q=2, resamples=40, k=400, classes=3, ks=(1, 3)),  # scratch, weights
        _maj_at_k("resample", q=2, resamples=9, k=70, ks=tuple(range(1, 71))),  # two launches
    ],
    # rows of a tile (1, 4, 8) by lanes of a key (8, 16, 32) by dtype: the combinations that verify's cases leave out
    "cross_attention": lambda: [
        _attention("decode", b=1, n=97, h=1, hkv=1, d=128),
        _attention("decode", b=1, n=70, h=1, hkv=1, d=200),
        _attention("decode", b=1, n=70, h=3, hkv=1, d=136),
        _attention("decode-gqa-causal", m=3, n=77, h=2, hkv=1, d=72),
        _attention("decode-gqa-causal", m=16, n=50, h=2, hkv=1, d=128),  # four tiles
        *(
            _attention(name, dtype, **changes)
            for dtype in (_BF16, _F16)
            for name, changes in (
                ("decode", {"b": 1, "n": 130, "h": 1, "hkv": 1, "d": 40}),
                ("decode", {"b": 1, "n": 97, "h": 1, "hkv": 1, "d": 128}),
                ("decode", {"b": 1, "n": 45, "h": 1, "hkv": 1, "d": 256}),
                ("decode", {"b": 1, "n": 300, "h": 3, "hkv": 1, "d": 8}),
                ("scattered", {"m": 4, "n": 77, "h": 1, "d": 96}),
                ("scattered", {"m": 3, "n": 45, "h": 1, "d": 248}),
                ("scattered", {"m": 7, "n": 500, "h": 2, "hkv": 1, "d": 24}),
                ("scattered", {"m": 3, "n": 99, "h": 3, "hkv": 1, "d": 80}),
                ("scattered", {"m": 5, "n": 45, "h": 2, "hkv": 1, "d": 256}),
            )
        ),
    ],
    "dual_lora": lambda: [
        _dual_lora("plain gelu", lead=(3,), m=517),  # too large for every block to compute the mix
        _dual_lora("plain gelu", _BF16, lead=(9,), m=520, r_pos=4, r_neg=4),
        _dual_lora("plain gelu", _F16, lead=(2,), m=513, r_pos=4, r_neg=4),
        _dual_lora("plain", lead=(64,), d_out=150),
        _dual_lora("square gelu", _BF16, lead=(17,), d_out=150, m=24),
        _dual_lora("square", _F16, lead=(1,), d_out=33, r_pos=3, r_neg=5),
    ],
}

FEW: dict[str, Callable[[], list[Case]]] = {
    "vote": lambda: [
        _vote("everything"),
        _vote("long", q=3, k=300, classes=9),
        _vote("weighted", q=5, k=4500, classes=3, unscored=0.1),
    ],
    "maj_at_k": lambda: [
        _maj_at_k("everything", q=3, resamples=70),
        _maj_at_k("adaptive", q=2, resamples=300, k=40, classes=7, ks=(1, 3, 40)),
        _maj_at_k("resample", q=2, resamples=40, k=800, classes=3, ks=(1, 3)),
    ],
    "cross_attention": lambda: [
        _attention("decode-gqa-causal", b=1, m=3, n=131, h=4),  # 6 rows: the tile has two to spare
        _attention("packed", b=1, m=4, n=70, h=1, d=72),  # four lanes share a row
        _attention("scattered", _BF16, b=1, m=1, n=200, h=1, d=72),
        _attention("no-keys", b=1),
    ],
    "dual_lora": lambda: [
        _dual_lora("plain", lead=(9,), d_out=70, r_neg=2),  # R = 7: a padded column
        _dual_lora("square gelu", lead=(9,), d_in=16, d_out=70),
        _dual_lora("plain gelu", lead=(3,), r_neg=2),
        _dual_lora("plain gelu", lead=(3,), d_out=8, m=517),
    ],
}

WRONG: dict[str, tuple[tuple[str, str], ...]] = {
    "vote": (
        ("i <= n; i += kThreads) {  // i == n", "i <= n + 1; i += kThreads) {  // i == n"),
        ("staged = pool.take<int64_t>(kGroups * n, \"answers\") + group * n;",
         "staged = pool.take<int64_t>(kGroups * n, \"answers\") + group * n + 1;"),
        ("sums = a.scratch + blockIdx.x * (2 * n + 1);", "sums = a.scratch + blockIdx.x * (2 * n);"),
        ("if (j < i && i < n) opens = false;", "if (j <= i && i < n) opens = false;"),
        ("return a.scores32[q * n + i];", "return a.scores32[q * n + i + 1];"),
    ),
    "maj_at_k": (
        ("const int j = i + static_cast<int>(__umulhi(u, static_cast<uint32_t>(n - i)));",
         "const int j = i + static_cast<int>(__umulhi(u, static_cast<uint32_t>(k - i + 1)));"),
        ("const int c = int(w.classes[drawn]);", "const int c = int(w.classes[j]);"),
        ("Shared<Sum> sums = w.sums + t;", "Shared<Sum> sums = w.sums + lane;"),
        ("Shared<Index> order = w.order + t;", "Shared<Index> order = w.order + t + 1;"),
        ("if (lane == 0) earned[warp * kSizes + at] += credit;", "earned[warp * kSizes + at] += credit;"),
        ("key0 += 0x9E3779B9u;", "key0 += 0x9E3779B8u;"),
    ),
    "cross_attention": (
        ("if (warp == 0 && writes && lane % kPerRow == 0) row_max[mine] = common;",  # other warps still read warp_max
         "if (warp == 0 && writes && lane % kPerRow == 0) { row_max[mine] = common; warp_max[mine] = common; }"),
        ("if (wanted && at < d) words[c]", "if (wanted) words[c]"),
        ("if (row >= a.rows) break;", ""),
        ("const int mine = lane / kPerRow;", "const int mine = lane % kRows;"),
        ("hi > last ? last : hi}", "hi}"),
        ("const bool seen = j >= own.lo && j < own.hi;", "const bool seen = j >= begin && j < end;"),
        ("__shfl_sync(kAllLanes, weight[u], r * kPerRow, kLanes)", "__shfl_sync(kAllLanes, weight[u], r, kLanes)"),
        ("if (sum != 0.0f) simt::store", "if (sum > 1.0f) simt::store"),
        ("if (part == 0.0f) continue;", ""),
        ("int64_t(s) * a.rows;\n    const float part", "int64_t(s) * a.d;\n    const float part"),
        ("(e / kPack * kLanes + lane) * kPack", "(e / kPack * kEach + lane) * kPack"),
    ),
    "dual_lora": (
        ("if (at + e < width) {", "if (at + e <= width) {"),
        ("if (i + e >= a.r) break;", ""),
        ("if (i + e < a.r_pos) pos[t]", "if (i + e <= a.r_pos) pos[t]"),
        ("rank_weight(a_neg, i, a.r_pos) * own", "rank_weight(a_neg, i, a.r_pos + 1) * own"),
        ("mix[index / padding * width + a.inner + index % padding]", "mix[index / padding * width + index % padding]"),
        ("if (h < a.inner) mix_unit", "mix_unit"),
        ("const bool exists = column < end;", "const bool exists = column <= end;"),
        ("if (t % kLanes == lane && exists", "if (t % kLanes == 0 && exists"),
        ("if (first + t < a.tokens) a.out[static", "a.out[static"),
        ("if (h >= a.hidden) return;", ""),
    ),
}  # fmt: skip
