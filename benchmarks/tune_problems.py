"""What `tune` measures: per op the kernels with launch numbers of their own, shapes, and candidates by arithmetic.

A problem calls the launcher of the op, on a GPU to be measured and with meta tensors to be compiled only, so that what
is checked is what runs. One shape for each kernel of cross_attention, linear_logprob and linear_nce: with several, a
row's bits would follow the number of rows. dual_lora has two, many tokens and few, as its defaults.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from calm_fast.core.launch_config import LaunchConfig

Run = Callable[[LaunchConfig], dict[str, torch.Tensor]]
HALF = torch.bfloat16
OPS = ("cross_attention", "linear_nce", "linear_logprob", "dual_lora")
HEAD_DIMS = (128, 64, 256)  # the most used first: a budget may run out
RANKS = (32, 128, 16)  # of both adapters together; 128 is also the width of the released form's bottleneck
_FEW_TOKENS = 16


@dataclass(frozen=True)
class Problem:
    """One kernel at one shape.

    depth and shape: as `core.launch_config` looks an entry up. default(arch): the launch numbers in code.
    prepare(device): inputs, and a function that launches the kernel with given numbers. group: entries that must be
    written together, or one of them would be taken for the other's shape. matrix: it multiplies on tensor cores.
    """

    op: str
    part: str
    depth: int
    shape: dict[str, int]
    candidates: tuple[LaunchConfig, ...]
    default: Callable[[int], LaunchConfig]
    prepare: Callable[[torch.device], Run]
    group: str = ""
    matrix: bool = True

    @property
    def name(self) -> str:
        sizes = " ".join(f"{key}={size}" for key, size in self.shape.items())
        return f"{self.op} {self.part} depth {self.depth} {sizes}"


def grid(
    rows: tuple[int, ...], columns: tuple[int, ...], warps: tuple[int, ...], stages: tuple[int, ...], least: int,
    most: int, split: int = 0,
) -> tuple[LaunchConfig, ...]:  # fmt: skip
    """All combinations whose tile gives each warp between `least` and `most` elements to accumulate."""
    return tuple(
        LaunchConfig(m, n, w, s, split_keys=split)
        for m, n, w, s in itertools.product(rows, columns, warps, stages)
        if least <= m * n // w <= most
    )


def candidates(part: str, head_dim: int) -> tuple[LaunchConfig, ...]:
    """Configs worth compiling for a part of cross_attention ("fwd", "dkdv", "dq", "decode") at a padded head dim."""
    if part == "decode":
        sizes = itertools.product((32, 64, 128), (256, 512, 1024), (2, 4))
        return tuple(LaunchConfig(16, n, warps, 2, split_keys=split) for n, split, warps in sizes)
    small = head_dim > 128
    if part == "fwd":
        return grid((64, 128), (16, 32) if small else (32, 64, 128), (4, 8), (2, 3), 128, 2048)
    rows, columns = ((16, 32, 64), (16, 32, 64)) if small else ((32, 64, 128), (32, 64, 128))
    return grid(rows, columns, (4, 8), (1, 2), 128, 1024)


def _cross_attention() -> Iterator[Problem]:
    for d, part in itertools.product(HEAD_DIMS, ("fwd", "dkdv", "dq", "decode")):
        b, m, n, h = (16, 1, 4096, 32) if part == "decode" else (2, 4096, 4096, 16)

        def default(arch: int, part: str = part, d: int = d) -> LaunchConfig:
            from calm_fast.kernels.cross_attention.configs import default_config

            return default_config(part, arch, HALF, d)

        def prepare(device: torch.device, part: str = part, sizes: tuple[int, ...] = (b, m, n, h, d)) -> Run:
            from calm_fast.kernels.cross_attention import launch as kernels
            from calm_fast.kernels.cross_attention.configs import pick_config

            b, m, n, h, d = sizes
            q, dout = (torch.randn(b, m, h, d, device=device, dtype=HALF) for _ in range(2))
            k, v = (torch.randn(b, n, h, d, device=device, dtype=HALF) for _ in range(2))
            masks: list[tuple[Any, Any, bool]] = [(None, None, m > 1)]
            if device.type == "meta":  # nothing is measured there, but intervals must compile as well
                lo, hi = (torch.empty(b, m, device=device, dtype=torch.int32) for _ in range(2))
                masks.append((lo, hi, False))

            def forward(config: LaunchConfig | None, mask: tuple[Any, Any, bool]) -> tuple[torch.Tensor, torch.Tensor]:
                return kernels.launch_cross_attention_fwd(q, k, v, *mask, d**-0.5, config=config)

            if part in ("fwd", "decode"):
                return lambda config: dict(zip(("out", "lse"), [forward(config, x) for x in masks][0], strict=True))
            shape = {"M": m, "N": n, "H": h, "Hkv": h}
            others = {other: pick_config(other, device, HALF, d, shape, False) for other in ("dkdv", "dq")}
            out, lse = forward(None, masks[0])

            def backward(config: LaunchConfig) -> dict[str, torch.Tensor]:
                both = kernels.BackwardConfig(**{**others, part: config})
                found = [
                    kernels.launch_cross_attention_bwd(dout, None, q, k, v, out, lse, *mask, d**-0.5, config=both)
                    for mask in masks
                ]
                return dict(zip(("dq", "dk", "dv"), found[0], strict=True))

            return backward

        yield Problem("cross_attention", part, d, {"M": m, "N": n}, candidates(part, d), default, prepare)


def _vocabulary(op: str) -> Iterator[Problem]:
    """linear_nce and linear_logprob: the sweep over the vocabulary, and a chunk of logit gradients."""
    t, d, v, chunk = 8192, 4096, 128256, 8192
    streams = 3 if op == "linear_nce" else 1
    for part in ("sweep", "dlogits"):

        def default(arch: int, part: str = part) -> LaunchConfig:
            return _module(op).default_config(part, arch, HALF, True)

        def prepare(device: torch.device, part: str = part) -> Run:
            kernels = _module(op)
            hidden = [torch.randn(t, d, device=device, dtype=HALF) for _ in range(streams)]
            weight = torch.randn(v, d, device=device, dtype=HALF) * d**-0.5
            targets = torch.randint(0, v, (t,), device=device)
            each = torch.rand(t, device=device)
            rows, columns = slice(0, t), slice(0, chunk)
            out = torch.empty(t if part == "dlogits" else 0, chunk, device=device, dtype=HALF)
            if op == "linear_logprob":

                def forward(config: LaunchConfig) -> dict[str, torch.Tensor]:
                    found = kernels.launch_linear_logprob_fwd(
                        *hidden, weight, None, targets, 1.0, None, -100, False, False, config=config
                    )
                    return {"logprob": found[0], "lse": found[3]}

                def gradient(config: LaunchConfig) -> dict[str, torch.Tensor]:
                    kernels.launch_linear_logprob_dlogits(
                        each, None, *hidden, weight, None, targets, 12.0 + each, each[:0], 1.0, None, -100, rows,
                        columns, out, config=config,
                    )  # fmt: skip
                    return {"dlogits": out}

            else:
                seq_ids = torch.arange(t, device=device) // 128

                def forward(config: LaunchConfig) -> dict[str, torch.Tensor]:
                    found = kernels.launch_linear_nce_fwd(
                        *hidden, weight, None, targets, seq_ids, 0.5, 1.0, 0.0, None, -100, config=config
                    )
                    return dict(zip(("loss", "lse", "coefficients"), found, strict=True))

                def gradient(config: LaunchConfig) -> dict[str, torch.Tensor]:
                    kernels.launch_linear_nce_dlogits(
                        each[0] + 1, *hidden[:2], weight, None, targets, 12.0 + each.expand(3, t).contiguous(),
                        each.expand(2, t).contiguous(), 1.0, None, rows, columns, out, config=config,
                    )  # fmt: skip
                    return {"dlogits": out}

            return forward if part == "sweep" else gradient

        # the columns of a program stay as they are: a token's bits must not depend on a file's presence in one length
        split = 2048 if part == "sweep" else 0
        most = 64 if streams == 3 and part == "sweep" else 128
        tried = grid((64, 128, 256), (64, 128, 256), (4, 8), (3, 4), 512, most * 32, split)
        yield Problem(op, part, d, {"T": t, "V": v}, tried, default, prepare)


def _module(op: str) -> Any:
    from calm_fast.kernels.linear_logprob import launch as linear_logprob
    from calm_fast.kernels.linear_nce import launch as linear_nce

    return linear_nce if op == "linear_nce" else linear_logprob


def _dual_lora() -> Iterator[Problem]:
    n, h = 4096, 128  # width of the layer; of the released form's bottleneck
    for r in RANKS:
        for part in ("update", "mix", "gelu_bwd", "gate_bwd"):
            for tokens in (8192, _FEW_TOKENS):
                width = {"update": n, "gate_bwd": r}.get(part, h)
                yield _dual_lora_problem(part, r, tokens, width, h)


def _dual_lora_problem(part: str, r: int, tokens: int, width: int, h: int) -> Problem:
    def default(arch: int) -> LaunchConfig:
        from calm_fast.kernels.dual_lora.configs import default_config

        return default_config(part, HALF, tokens, r)

    def prepare(device: torch.device) -> Run:
        from calm_fast.kernels.dual_lora import launch as kernels

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=HALF) * shape[-1] ** -0.5

        zg = draw(tokens, 2 * r)
        if part == "update":
            y, up = draw(tokens, width), draw(width, r)
            return lambda config: {"out": kernels.launch_dual_lora_fwd(zg, y, up, r // 2, config=config)}
        if part == "gate_bwd":
            dmix = draw(tokens, r)
            return lambda config: dict(
                zip(("dzg", "mix"), kernels.launch_dual_lora_bwd(dmix, zg, r // 2, config=config), strict=True)
            )
        up = draw(h, r)
        if part == "mix":
            y, c1, c2 = draw(tokens, 4096), draw(h, 4096), draw(4096, h)
            return lambda config: {
                "mix": kernels.launch_dual_lora_gelu_fwd(zg, y, c1, up, c2, r // 2, config=config)[2]
            }
        u, dmix = draw(tokens, h), draw(tokens, h)
        return lambda config: dict(
            zip(
                ("dzg", "dpos", "dneg"),
                kernels.launch_dual_lora_gelu_bwd(dmix, zg, u, up, r // 2, config=config),
                strict=True,
            )
        )

    few = tokens <= _FEW_TOKENS
    if few:
        tried = grid((16,), (32, 64, 128), (2, 4), (2, 3), 128, 2048)
    else:
        tried = grid((32, 64, 128), (32, 64, 128), (4, 8), (1, 2) if part == "gelu_bwd" else (2, 3), 256, 2048)
    if part == "gate_bwd":  # no columns of its own
        tried = tuple(LaunchConfig(m, 64, w, 2) for m in ((4, 8, 16) if few else (16, 32, 64)) for w in (2, 4, 8))
    shape = {"T": tokens, "N": width}
    return Problem("dual_lora", part, r, shape, tried, default, prepare, f"{part} {r}", matrix=part != "gate_bwd")


def problems(ops: tuple[str, ...] = OPS) -> list[Problem]:
    """Everything that is measured, op by op; within an op the most used first."""
    found: list[Problem] = []
    for op in ops:
        if op == "cross_attention":
            found += _cross_attention()
        elif op == "dual_lora":
            found += _dual_lora()
        else:
            found += _vocabulary(op)
    return found
