"""All three stages from a file of rows and a model to adapters on disk; finished stages are not repeated."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from calm_fast.hf.dual_lora import get_gates, load_dual_lora, record_gates, save_dual_lora, save_lora_adapter
from calm_fast.nat.data import Example, Graded, RationaleDataset, RightPadding, grade, read_rows
from calm_fast.nat.stages import History, Settings, distil_nce, train_nat, train_negative

_RESULTS = "results.json"


def run(
    data: str | os.PathLike,
    model: str | os.PathLike,
    out: str | os.PathLike,
    settings: Settings | None = None,
    *,
    limit: int | None = None,
    max_length: int = 512,
) -> dict[str, Any]:
    """Negative LoRA, NAT and NCE on the rows of `data`, resumable; what `calm-fast nat` does.

    Args:
        data: JSONL rows (question, answer, generated_answer). model: folder of a transformers causal language model
            with its tokenizer. out: gets negative/ (PEFT adapter), nat/ (dual LoRA), student/ (PEFT adapter) and
            results.json with losses, gate statistics and the rows that were left out.
        limit: read only so many rows. max_length: tokens an example may have.
    Returns:
        what results.json holds.
    Raises:
        ValueError: a bad row, no right or no wrong rationale, or `out` belongs to other settings, data or model.
    """
    settings = settings or Settings()
    tokenizer = _tokenizer(model)  # before anything is written
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    # how a run is shown and how often it is saved change nothing of what it computes
    decisive = {k: v for k, v in asdict(settings).items() if k not in ("progress", "save_every")}
    identity = {"settings": decisive, "limit": limit, "max_length": max_length, "data": _digest(data)}
    identity["model"] = _model_digest(Path(model))
    results = _resume(out / _RESULTS, json.loads(json.dumps(identity)))

    graded = _graded(out / "graded.json", data, limit, settings.progress)
    right, wrong = graded.right, graded.wrong
    for name, examples in (("right", right), ("wrong", wrong)):
        if not examples:
            reasons = "".join(f"; {count} rows with {reason}" for reason, count in graded.left_out.items())
            raise ValueError(f"nat: the data holds no {name} rationale; all three stages need both kinds{reasons}")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rights, wrongs = (RationaleDataset(e, tokenizer, max_length) for e in (right, wrong))
    results["examples"] = {"right": len(right), "wrong": len(wrong)}
    results["left_out"] = graded.left_out

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(os.fspath(model)).eval()

    def stage(name: str, work: Callable[[], History]) -> None:
        if name not in results["losses"]:
            losses = work()
            results["losses"][name] = [{"step": e["step"], "loss": e["loss"]} for e in losses]
            _write(out / _RESULTS, results)

    stage("negative", lambda: _negative(load(), wrongs, pad_id, out, settings))
    stage("nat", lambda: _nat(load(), rights, pad_id, out, settings, results))
    stage("student", lambda: _student(load(), rights, pad_id, out, settings))
    return results


def _negative(model: PreTrainedModel, data: RationaleDataset, pad_id: int, out: Path, settings: Settings) -> History:
    losses = train_negative(model, data, pad_id, out / "checkpoints" / "negative", settings)
    save_lora_adapter(model, out / "negative", "neg")
    return losses


def _nat(
    model: PreTrainedModel, data: RationaleDataset, pad_id: int, out: Path, settings: Settings, results: dict[str, Any]
) -> History:
    losses = train_nat(model, data, out / "negative", pad_id, out / "checkpoints" / "nat", settings)
    save_dual_lora(model, out / "nat")
    results["gates"] = gate_means(model.eval(), data, pad_id)
    return losses


def _student(model: PreTrainedModel, data: RationaleDataset, pad_id: int, out: Path, settings: Settings) -> History:
    load_dual_lora(model, out / "nat", mode="mix")
    student, losses = distil_nce(model, data, pad_id, out / "checkpoints" / "student", settings)
    save_lora_adapter(student, out / "student", "pos")
    return losses


def gate_means(model: PreTrainedModel, data: RationaleDataset, pad_id: int, batches: int = 4) -> dict[str, dict]:
    """Mean and spread of p_neg per layer over the first examples (padding included)."""
    record_gates(model)
    with torch.no_grad():
        for start in range(0, min(len(data), 4 * batches), 4):
            batch = RightPadding(pad_id)(data.items[start : start + 4])
            batch.pop("labels")
            model(**{k: t.to(model.device) for k, t in batch.items()}, use_cache=False)
    gates = get_gates(model)
    record_gates(model, False)
    return {path: {"mean": g.mean, "std": g.std, "tokens": g.tokens} for path, g in gates.items()}


def _graded(file: Path, data: Any, limit: int | None, progress: bool) -> Graded:
    """Right and wrong rationales; grading takes minutes on large files, so its outcome is kept."""
    if not file.is_file():
        _write(file, asdict(grade(read_rows(data, limit), progress=progress)))
    kept = json.loads(file.read_text(encoding="utf-8"))
    right, wrong = ([Example(**e) for e in kept[side]] for side in ("right", "wrong"))
    return Graded(right, wrong, kept.get("left_out", {}))


def _tokenizer(model: str | os.PathLike) -> Any:
    wanted = "nat: `model` must be the folder of a transformers causal language model with its tokenizer"
    if not Path(model).is_dir():  # transformers would take it for a name on the hub
        raise ValueError(f"{wanted}, got {os.fspath(model)!r}, which is no folder")
    try:
        AutoConfig.from_pretrained(os.fspath(model))
        return AutoTokenizer.from_pretrained(os.fspath(model))
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise ValueError(f"{wanted}, got {os.fspath(model)!r}: {reason}") from problem


def _resume(file: Path, identity: dict[str, Any]) -> dict[str, Any]:
    fresh = {"identity": identity, "losses": {}}
    if not file.is_file():
        _write(file, fresh)
        return fresh
    results = json.loads(file.read_text(encoding="utf-8"))
    if results.get("identity") != identity:
        changed = [k for k in identity if results.get("identity", {}).get(k) != identity[k]]
        if not results.get("losses") and not (file.parent / "checkpoints").exists():
            # nothing was trained yet: the mistake that ended that run must not keep the folder
            if {"data", "limit"} & set(changed):
                (file.parent / "graded.json").unlink(missing_ok=True)
            _write(file, fresh)
            return fresh
        raise ValueError(f"nat: `out` holds a run with other {', '.join(changed)}; choose another folder")
    return results


def _digest(file: str | os.PathLike) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _model_digest(folder: Path, edge: int = 1 << 20) -> str:
    """Tells models apart without reading all of them: config, and name, size and both ends of every weight file."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.name == "config.json" or file.suffix in (".safetensors", ".bin"):
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            with file.open("rb") as content:
                digest.update(content.read(edge))
                content.seek(max(0, file.stat().st_size - edge))
                digest.update(content.read(edge))
    return digest.hexdigest()


def _write(file: Path, content: dict[str, Any]) -> None:
    """Write JSON so that an interruption leaves the old file or the new one."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
