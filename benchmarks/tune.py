"""Measure launch configs on this GPU and write the best: `python -m calm_fast.benchmarks.tune --op cross_attention`.

Every candidate must give what the present config gives before its time counts; one that does not compile or does not
fit is skipped. The file is what `calm_fast._tuning` looks configs up in.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from calm_fast._tuning import LaunchConfig, gpu_slug
from calm_fast.benchmarks import machine
from calm_fast.benchmarks.measure import relative_error
from calm_fast.benchmarks.timing import Budget, interleave

OPS = ("cross_attention",)
HEAD_DIMS = (128, 64, 256)  # the most used first: a budget may run out
_TOLERANCE = 1e-2  # bf16 results of two tilings differ by rounding, about 1e-3
_BUDGET = Budget(seconds=0.4, min_rounds=5, max_rounds=40)
Run = Callable[[LaunchConfig], dict[str, torch.Tensor]]


def candidates(part: str, head_dim: int) -> list[LaunchConfig]:
    """Configs worth compiling for `part` ("fwd", "dkdv", "dq", "decode") at a padded head dim."""
    if part == "decode":
        sizes = itertools.product((32, 64, 128), (256, 512, 1024), (2, 4))
        return [LaunchConfig(16, n, warps, 2, split_keys=split) for n, split, warps in sizes]
    rows = (64, 128) if head_dim <= 128 else (32, 64, 128)
    keys = (32, 64, 128) if head_dim <= 128 else (32, 64)
    found = [
        LaunchConfig(m, n, warps, stages)
        for m, n, warps, stages in itertools.product(rows, keys, (4, 8), (2, 3))
        if not (m == 64 and warps == 8 and n == 32)  # too little work for eight warps
    ]
    return found if part == "fwd" else [replace(c, num_stages=c.num_stages - 1) for c in found if c.block_m <= 128]


def best_config(
    run: Run, present: LaunchConfig, tried: Iterable[LaunchConfig], device: torch.device, deadline: float
) -> tuple[LaunchConfig, float, float]:
    """The fastest of `present` and `tried` that agrees with `present`.

    Args:
        run: launches with a config and returns results. deadline: time.monotonic() after which nothing new is tried.
    Returns:
        config, its milliseconds, the present config's milliseconds (all survivors measured in turns).
    """
    expected = {name: t.clone() for name, t in run(present).items()}
    survivors: dict[LaunchConfig, float] = {}
    for config in tried:
        if time.monotonic() > deadline:
            break
        if config == present:
            continue
        try:
            if relative_error(run(config), expected) > _TOLERANCE:
                print(f"  wrong result, ignored: {config}", file=sys.stderr)
                continue
            pair = {"present": lambda: run(present), "new": lambda c=config: run(c)}
            times = interleave(pair, device, Budget(0.1, 3, 10))
        except Exception as failure:  # noqa: BLE001 - compilers and launches fail in many ways; each only rules out one
            print(f"  {type(failure).__name__}, ignored: {config}", file=sys.stderr)
            continue
        survivors[config] = times["new"].ms / times["present"].ms
    finalists = [present, *sorted(survivors, key=survivors.get)[:3]]
    times = interleave({str(c): lambda c=c: run(c) for c in finalists}, device, _BUDGET)
    winner = min(finalists, key=lambda c: times[str(c)].ms)
    return winner, times[str(winner)].ms, times[str(present)].ms


def _tune_cross_attention(device: torch.device, deadline: float) -> list[dict[str, Any]]:
    from calm_fast.kernels import cross_attention as kernels
    from calm_fast.kernels.cross_attention_configs import pick_config

    entries = []
    for d, part in itertools.product(HEAD_DIMS, ("fwd", "dkdv", "dq", "decode")):
        if time.monotonic() > deadline:
            print(f"out of time before {part} at head dim {d}", file=sys.stderr)
            break
        b, m, n, h = (16, 1, 4096, 32) if part == "decode" else (2, 4096, 4096, 16)
        q, dout = (torch.randn(b, m, h, d, device=device, dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.randn(b, n, h, d, device=device, dtype=torch.bfloat16) for _ in range(2))
        call = (None, None, m > 1, d**-0.5)  # no intervals, causal unless decoding
        shape = {"M": m, "N": n, "H": h, "Hkv": h}
        now = {p: pick_config(p, device, q.dtype, d, shape, False) for p in ("fwd", "dkdv", "dq", "decode")}
        if part in ("fwd", "decode"):

            def run(config, q=q, k=k, v=v, call=call):
                out, lse = kernels.launch_cross_attention_fwd(q, k, v, *call, config=config)
                return {"out": out, "lse": lse}

        else:
            out, lse = kernels.launch_cross_attention_fwd(q, k, v, *call)

            def run(config, q=q, k=k, v=v, call=call, dout=dout, out=out, lse=lse, now=now, part=part):
                both = kernels.BackwardConfig(**{"dkdv": now["dkdv"], "dq": now["dq"], part: config})
                grads = kernels.launch_cross_attention_bwd(dout, None, q, k, v, out, lse, *call, config=both)
                return dict(zip(("dq", "dk", "dv"), grads, strict=True))

        config, ms, before = best_config(run, now[part], candidates(part, d), device, deadline)
        print(f"{part:7s} D{d:<4d} {before:.3f} ms -> {ms:.3f} ms  {config}")
        measured = {"M": m, "N": n}
        entries.append(
            {
                "part": part,
                "dtype": "bfloat16",
                "head_dim": d,
                "shape": measured,
                "config": asdict(config),
                "ms": round(ms, 4),
                "ms_before": round(before, 4),
            }  # fmt: skip
        )
    return entries


def merge(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of a tuned file: new ones replace old ones of the same part, dtype, head dim and shape."""

    def key(entry: dict[str, Any]) -> tuple:
        return entry["part"], entry["dtype"], entry["head_dim"], tuple(sorted(entry["shape"].items()))

    merged = {key(entry): entry for entry in (*old, *new)}
    return [merged[k] for k in sorted(merged)]


def main(argv: Sequence[str] | None = None) -> int:
    """Tune `--op` within `--seconds`, merge into OUT/<op>/<gpu>.json; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m calm_fast.benchmarks.tune", description=__doc__.splitlines()[0])
    p.add_argument("--op", choices=OPS, default=OPS[0])
    p.add_argument("--seconds", type=float, default=120.0, help="after this long nothing new is tried")
    p.add_argument("--out", type=Path, default=Path("kernels/fused/tuned"), help="folder that holds <op>/<gpu>.json")
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"tune: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    entries = _tune_cross_attention(device, time.monotonic() + args.seconds)
    gpu = torch.cuda.get_device_name(device)
    path = args.out / args.op / f"{gpu_slug(gpu)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text())["entries"] if path.is_file() else []
    document = {"op": args.op, "gpu": gpu, "versions": machine.versions(), "entries": merge(old, entries)}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {len(entries)} entries to {path}")
    return 0 if entries else 1


if __name__ == "__main__":
    sys.exit(main())
