"""Problems that `tune` measures: the tunable kernels of each op, their shapes, and candidate configs by arithmetic.

A problem calls the launcher of the op: on a GPU to measure it, with meta tensors only to compile it. So the code that
is checked is the code that runs. Each kernel of cross_attention, linear_logprob and linear_nce has one shape: with
several, a row's bits would depend on the number of rows. dual_lora has two, many tokens and few, like its defaults.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from calm_fast.core.launch_config import LaunchConfig

if TYPE_CHECKING:  # Triton is imported only where kernels are launched
    from calm_fast.kernels.common.config_table import ConfigTable
    from calm_fast.kernels.cross_attention.configs import AttentionConfig, DecodeConfig
    from calm_fast.kernels.dual_lora.configs import GateConfig, TileConfig

Run = Callable[[Any], dict[str, torch.Tensor]]  # takes a config of the problem's kernel, returns its results
Config = TypeVar("Config", bound=LaunchConfig)
Tile = Callable[[int, int, int, int], Config]  # rows, columns, warps, stages of a tile
HALF = torch.bfloat16
OPS = ("cross_attention", "linear_nce", "linear_logprob", "dual_lora")
HEAD_DIMS = (128, 64, 256)  # the most used first: a budget may run out
RANKS = (32, 128, 16)  # of both adapters together; 128 is also the width of the bottleneck of the released form
_FEW_TOKENS = 16


@dataclass(frozen=True)
class Problem:
    """One kernel at one shape.

    depth, shape: as `core.launch_config` looks an entry up. default(arch): the config in code. prepare(device): makes
    inputs and returns a function that launches the kernel with a given config. group: entries that must be written
    together, or one of them would be used for the other's shape. matrix: the kernel multiplies on tensor cores.
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
    def kind(self) -> type[LaunchConfig]:
        """The dataclass of the kernel's configs."""
        return type(self.candidates[0])

    @property
    def name(self) -> str:
        sizes = " ".join(f"{key}={size}" for key, size in self.shape.items())
        return f"{self.op} {self.part} depth {self.depth} {sizes}"


def grid(
    tile: Tile[Config], rows: tuple[int, ...], columns: tuple[int, ...], warps: tuple[int, ...],
    stages: tuple[int, ...], least: int, most: int,
) -> tuple[Config, ...]:  # fmt: skip
    """Return all combinations whose tile gives each warp between `least` and `most` elements to accumulate."""
    return tuple(
        tile(m, n, w, s)
        for m, n, w, s in itertools.product(rows, columns, warps, stages)
        if least <= m * n // w <= most
    )


def attention_candidates(part: str, head_dim: int) -> tuple[AttentionConfig, ...]:
    """Return configs worth compiling for the fwd, dkdv or dq kernel of cross_attention at a padded head dim."""
    from calm_fast.kernels.cross_attention.configs import attention_tile

    small = head_dim > 128
    if part == "fwd":
        columns = (16, 32, 64) if small else (32, 64, 128)
        return grid(attention_tile, (64, 128), columns, (4, 8), (2, 3), 128, 2048)
    sides = (16, 32, 64) if small else (32, 64, 128)
    return grid(attention_tile, sides, sides, (4, 8), (1, 2), 128, 1024)


def decode_candidates() -> tuple[DecodeConfig, ...]:
    """Return configs worth compiling for the decode kernel of cross_attention."""
    from calm_fast.kernels.cross_attention.configs import DecodeConfig

    return tuple(
        DecodeConfig(block_r=16, block_n=n, split_keys=split, num_warps=warps, num_stages=2)
        for n, split, warps in itertools.product((32, 64, 128), (256, 512, 1024), (2, 4))
    )


def _cross_attention() -> Iterator[Problem]:
    for d, part in itertools.product(HEAD_DIMS, ("fwd", "dkdv", "dq", "decode")):
        b, m, n, h = (16, 1, 4096, 32) if part == "decode" else (2, 4096, 4096, 16)

        def default(arch: int, part: str = part, d: int = d) -> LaunchConfig:
            from calm_fast.kernels.cross_attention.configs import TABLES, table_size

            return TABLES[part].default(arch, HALF, table_size(d))

        def prepare(device: torch.device, part: str = part, sizes: tuple[int, ...] = (b, m, n, h, d)) -> Run:
            from calm_fast.kernels.common import hardware
            from calm_fast.kernels.cross_attention import launch as kernels
            from calm_fast.kernels.cross_attention import launch_bwd
            from calm_fast.kernels.cross_attention.configs import DKDV, DQ, BackwardConfig, dv_config, table_size

            b, m, n, h, d = sizes
            q, dout = (torch.randn(b, m, h, d, device=device, dtype=HALF) for _ in range(2))
            k, v = (torch.randn(b, n, h, d, device=device, dtype=HALF) for _ in range(2))
            masks: list[tuple[Any, Any, bool]] = [(None, None, m > 1)]
            if device.type == "meta":  # nothing is measured there, but intervals must compile as well
                lo, hi = (torch.empty(b, m, device=device, dtype=torch.int32) for _ in range(2))
                masks.append((lo, hi, False))

            def forward(config: Any, mask: tuple[Any, Any, bool]) -> tuple[torch.Tensor, torch.Tensor]:
                return kernels.launch_cross_attention_fwd(q, k, v, *mask, d**-0.5, config=config)

            if part in ("fwd", "decode"):
                return lambda config: dict(zip(("out", "lse"), [forward(config, x) for x in masks][0], strict=True))
            shape = {"M": m, "N": n, "H": h, "Hkv": h}
            dkdv, dq = (table.pick(device, HALF, table_size(d), d, shape, interpreted=False) for table in (DKDV, DQ))
            out, lse = forward(None, masks[0])

            def backward(config: AttentionConfig) -> dict[str, torch.Tensor]:
                chosen = {"dkdv": dkdv, "dq": dq} | {part: config}
                both = BackwardConfig(**chosen, dv=dv_config(hardware.gpu(device).arch, HALF, table_size(d)))
                found = [
                    launch_bwd.launch_cross_attention_bwd(dout, None, q, k, v, out, lse, *mask, d**-0.5, config=both)
                    for mask in masks
                ]
                return dict(zip(("dq", "dk", "dv"), found[0], strict=True))

            return backward

        tried = decode_candidates() if part == "decode" else attention_candidates(part, d)
        yield Problem("cross_attention", part, d, {"M": m, "N": n}, tried, default, prepare)


def _vocabulary(op: str) -> Iterator[Problem]:
    """linear_nce and linear_logprob: the sweep over the vocabulary, and a chunk of logit gradients."""
    from calm_fast.kernels.vocabulary.configs import dlogits_tile, sweep_tile

    t, d, v, chunk = 8192, 4096, 128256, 8192
    streams = 3 if op == "linear_nce" else 1
    for part in ("sweep", "dlogits"):

        def default(arch: int, part: str = part) -> LaunchConfig:
            return _tables(op)[part].default(arch, HALF, "plain")

        def prepare(device: torch.device, part: str = part) -> Run:
            kernels = _launchers(op)
            hidden = [torch.randn(t, d, device=device, dtype=HALF) for _ in range(streams)]
            weight = torch.randn(v, d, device=device, dtype=HALF) * d**-0.5
            targets = torch.randint(0, v, (t,), device=device)
            each = torch.rand(t, device=device)
            rows, columns = slice(0, t), slice(0, chunk)
            out = torch.empty(t if part == "dlogits" else 0, chunk, device=device, dtype=HALF)
            if op == "linear_logprob":

                def forward(config: Any) -> dict[str, torch.Tensor]:
                    found = kernels.launch_linear_logprob_fwd(
                        *hidden, weight, None, targets, 1.0, None, -100, False, False, config=config
                    )
                    return {"logprob": found[0], "lse": found[3]}

                def gradient(config: Any) -> dict[str, torch.Tensor]:
                    kernels.launch_linear_logprob_dlogits(
                        each, None, *hidden, weight, None, targets, 12.0 + each, each[:0], 1.0, None, -100, rows,
                        columns, out, config=config,
                    )  # fmt: skip
                    return {"dlogits": out}

            else:
                seq_ids = torch.arange(t, device=device) // 128

                def forward(config: Any) -> dict[str, torch.Tensor]:
                    found = kernels.launch_linear_nce_fwd(
                        *hidden, weight, None, targets, seq_ids, 0.5, 1.0, 0.0, None, -100, config=config
                    )
                    return dict(zip(("loss", "lse", "coefficients"), found, strict=True))

                def gradient(config: Any) -> dict[str, torch.Tensor]:
                    kernels.launch_linear_nce_dlogits(
                        each[0] + 1, *hidden[:2], weight, None, targets, 12.0 + each.expand(3, t).contiguous(),
                        each.expand(2, t).contiguous(), 1.0, None, rows, columns, out, config=config,
                    )  # fmt: skip
                    return {"dlogits": out}

            return forward if part == "sweep" else gradient

        # all candidates have the same split_v: a token's bits must not depend on a measured file
        tile: Tile[Any] = sweep_tile if part == "sweep" else dlogits_tile
        most = 64 if streams == 3 and part == "sweep" else 128
        tried = grid(tile, (64, 128, 256), (64, 128, 256), (4, 8), (3, 4), 512, most * 32)
        yield Problem(op, part, d, {"T": t, "V": v}, tried, default, prepare)


def _launchers(op: str) -> Any:
    from calm_fast.kernels.linear_logprob import launch as linear_logprob
    from calm_fast.kernels.linear_nce import launch as linear_nce

    return linear_nce if op == "linear_nce" else linear_logprob


def _tables(op: str) -> Mapping[str, ConfigTable[str, Any]]:
    from calm_fast.kernels.linear_logprob.configs import TABLES as linear_logprob
    from calm_fast.kernels.linear_nce.configs import TABLES as linear_nce

    return linear_nce if op == "linear_nce" else linear_logprob


def _dual_lora() -> Iterator[Problem]:
    n, h = 4096, 128  # width of the layer, and of the released form's bottleneck
    for r in RANKS:
        for part in ("update", "mix", "gelu_bwd", "gate_bwd"):
            for tokens in (8192, _FEW_TOKENS):
                width = {"update": n, "gate_bwd": r}.get(part, h)
                yield _dual_lora_problem(part, r, tokens, width, h)


def _gate_candidates(tokens: int) -> tuple[GateConfig, ...]:
    from calm_fast.kernels.dual_lora.configs import gate_tile

    blocks = (4, 8, 16) if tokens <= _FEW_TOKENS else (16, 32, 64)
    return tuple(gate_tile(block, warps, 2) for block in blocks for warps in (2, 4, 8))


def _dual_lora_candidates(part: str, tokens: int) -> tuple[TileConfig, ...]:
    from calm_fast.kernels.dual_lora.configs import tile

    if tokens <= _FEW_TOKENS:
        return grid(tile, (16,), (32, 64, 128), (2, 4), (2, 3), 128, 2048)
    stages = (1, 2) if part == "gelu_bwd" else (2, 3)
    return grid(tile, (32, 64, 128), (32, 64, 128), (4, 8), stages, 256, 2048)


def _dual_lora_problem(part: str, r: int, tokens: int, width: int, h: int) -> Problem:
    def default(arch: int) -> LaunchConfig:
        from calm_fast.kernels.dual_lora.configs import TABLES, table_size

        return TABLES[part].default(arch, HALF, table_size(tokens, r, gated=part == "update"))

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

    tried = _gate_candidates(tokens) if part == "gate_bwd" else _dual_lora_candidates(part, tokens)
    shape = {"T": tokens, "N": width}
    return Problem("dual_lora", part, r, shape, tried, default, prepare, f"{part} {r}", matrix=part != "gate_bwd")


def problems(ops: tuple[str, ...] = OPS) -> list[Problem]:
    """Return every problem, op by op; within an op the most used first."""
    found: list[Problem] = []
    for op in ops:
        if op == "cross_attention":
            found += _cross_attention()
        elif op == "dual_lora":
            found += _dual_lora()
        else:
            found += _vocabulary(op)
    return found
