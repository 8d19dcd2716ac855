"""A plan as lines of text."""

from __future__ import annotations

from typing import Any


def _size(count: float) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def lines(found: dict[str, Any]) -> list[str]:
    """Return the result of `plan` for a terminal."""
    setting, memory, flops, time = found["setting"], found["memory"], found["flops"], found["time"]
    run, cached = (memory[name] for name in ("augmenters_run", "states_cached"))
    text = [
        *(
            f"{part['name']:3} {part['family']}: {part['parameters']:,} parameters, {_size(part['bytes'])}"
            + (f" ({_size(part['kept_bytes'])} up to the last connected layer)" if "kept_bytes" in part else "")
            for part in found["parts"]
        ),
        f"A+B {len(found['connections'])} connections, {found['parameters']['trained']:,} parameters train",
        f"{setting['steps']:,} steps of {setting['gpus']} x {setting['batch_size']} rows x {setting['length']} tokens",
        "",
        f"{'memory per GPU':32}{'A runs':>14}{'A cached':>14}",
    ]
    names = {"weights": "weights", "optimizer": "optimizer", "saved_activations": "kept for the backward pass",
             "step_peak": "peak of a step, gradients too", "total": "total"}  # fmt: skip
    text += [f"  {names[name]:30}{_size(run[name]):>14}{_size(cached[name]):>14}" for name in names]
    for kind, own in (("A runs", run), ("A cached", cached)):
        if own["total"] > memory["gpu"]:
            text.append(f"  {kind}: does not fit into the {memory['gpu'] / 1e9:.0f} GB of an {setting['gpu']}")
    text += [
        "",
        f"FLOPs of a step: {flops['step']:.4g}, of which A {100 * flops['augmenters_share']:.1f} %; all tokens "
        f"{flops['all_tokens']:.4g}",
        f"{'time, a model of ' + setting['gpu']:32}{'A runs':>14}{'A cached':>14}",
    ]
    for name, label in (("compute_s", "compute"), ("interconnect_s", "interconnect"), ("step_s", "step"),
                        ("all_tokens_s", "all tokens")):  # fmt: skip
        values = (time[kind][name] for kind in ("augmenters_run", "states_cached"))
        text.append(f"  {label:30}" + "".join(f"{_duration(value):>14}" for value in values))
    moved = [found["interconnect"][kind]["bytes"] for kind in ("augmenters_run", "states_cached")]
    text.append(f"  {'bytes sent per GPU and step':30}" + "".join(f"{_size(value):>14}" for value in moved))
    caches = found["caches"]
    text += ["", f"states on disk: {_size(caches['states_bfloat16'])} per token in bfloat16, "
             f"{_size(caches['states_bfloat16'] * setting['tokens'])} for all tokens if no row repeats"]  # fmt: skip
    if "anchor" in caches:
        text.append(
            f"caches of generation per token: anchor {_size(caches['anchor'])}, A {_size(caches['augmenters'])}, "
            f"connections {_size(caches['cross'])}"
        )
    return text
