"""The report of run.py: right answers and losses per model, as Markdown."""

from __future__ import annotations

import math
from typing import Any

ROWS = {
    "anchor": "anchor alone",
    "augmenter": "augmenter alone",
    "lora": "anchor with LoRA",
    "composition": "composition",
}
NAMES = {"gemma3": "Gemma-3-270M", "smollm2": "SmolLM2-135M"}


def interval(right: int, rows: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    z, share = 1.96, right / rows
    middle = share + z * z / (2 * rows)
    spread = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def share(found: dict[str, Any]) -> str:
    """Return right answers in percent with their interval."""
    low, high = interval(found["right"], found["rows"])
    return f"{100 * found['right'] / found['rows']:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def report(results: dict[str, Any]) -> str:
    """Return the report of `results`, as run.py writes them."""
    recipe = results["recipe"]
    lines = [
        "# What only the augmenter knows",
        "",
        f"Questions about {recipe['held_out_names']} names. Only the augmenter, SmolLM2-135M, was told their animals. "
        f"The connections and LoRA were trained on {recipe['training_names']} other names.",
        "",
        "| anchor | seed | model | trained parameters | bits per byte of the answer | right answers (95 % interval) |",
        "|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        for key, name in ROWS.items():
            found, size = run[key], run["parameters"].get(key)
            cells = [NAMES.get(run["name"], run["name"]), str(run["seed"]), name, "" if size is None else f"{size:,}"]
            cells += [f"{found['bits_per_byte']:.2f} ± {found['standard_error']:.2f}", share(found)]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "On the names of the training rows, to see what was learned by heart:", ""]
    for run in results["runs"]:
        shares = [share(run[f"{key}_on_training_names"]) for key in ("composition", "lora")]
        lines.append(f"- {run['name']}, seed {run['seed']}: composition {shares[0]}, LoRA {shares[1]}")
    for run in results["runs"]:
        lines += ["", f"Answers of the composition with {run['name']}, seed {run['seed']}:", ""]
        for one in run["samples"]:
            question = one["prompt"].splitlines()[0]
            lines.append(f"- {question} **{one['answer'].strip()}** (true: {one['true'].strip()})")
    taught = ", ".join(f"{one['steps']} steps in {one['seconds']:.0f} s" for one in results["teaching"])
    lines += [
        "",
        f"Teaching took {taught}. The whole run took {results['seconds']:.0f} s and {results['memory_gib']:.1f} GiB at "
        f"most, on {results['machine']}, products in {recipe['dtype']}.",
        "",
    ]
    return "\n".join(lines)
