"""Run all three stages from a file of rows and a model to adapters on disk; finished stages are not repeated."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from calm_fast.consistency.sampling.prompt import PLAIN, Prompt, prompt_form
from calm_fast.core.checks import bad_value, errors_of
from calm_fast.core.eval_mode import eval_mode
from calm_fast.core.files import write_json
from calm_fast.core.fingerprint import file_checksum, json_checksum, model_folder_fingerprint
from calm_fast.core.token_ids import padding_id
from calm_fast.hf.dual_lora import add_dual_lora, get_gates, record_gates
from calm_fast.hf.dual_lora_files import load_dual_lora, save_dual_lora, save_lora_adapter
from calm_fast.hf.dual_lora_targets import default_targets
from calm_fast.modules.dual_lora import DualLoRALinear
from calm_fast.nat.data import Example, Graded, RationaleDataset, RightPadding, grade, read_rows
from calm_fast.nat.stages import History, Settings, distil_nce, train_nat, train_negative
from calm_fast.nat.trainer import find_nce_head

_RESULTS = "results.json"


def run(
    data: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    limit: int | None = None,
    max_length: int = 512,
    prompt: Prompt = None,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train negative LoRA, NAT and NCE on the rows of `data`, as `calm-fast nat` does; a second call resumes the first.

    Args:
        data: JSONL rows (question, answer, generated_answer). model: folder of a transformers causal language model
            with its tokenizer. out: gets negative/ (PEFT adapter), nat/ (dual LoRA), student/ (PEFT adapter) and
            results.json with losses, gate statistics and the number of rows that were left out.
        settings: see `Settings`. limit: most rows to read. max_length: most tokens of an example.
        prompt, system, chat_template_kwargs: form of the prompts, see `RationaleDataset`; prompt.json beside each
            adapter records it.
    Returns:
        the content of results.json.
    Raises:
        ValueError: a row is wrong, there is no right or no wrong rationale, or `out` holds a run with other settings,
            data or another model.
    """
    settings = settings or Settings()
    tokenizer = _load_tokenizer(model)  # fail before anything is written
    if settings.target_modules is None:
        settings = replace(settings, target_modules=_usual_targets(model))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    # progress and checkpoints do not change the result
    decisive = {k: v for k, v in asdict(settings).items() if k not in ("progress", "save_every")}
    decisive["warmup"] = settings.warmup_steps
    if settings.nce_masking == "paper":
        del decisive["nce_masking"]  # earlier versions, whose runs go on, had no other
    identity: dict[str, Any] = {
        "settings": decisive,
        "limit": limit,
        "max_length": max_length,
        "data": file_checksum(data),
    }
    identity["model"] = model_folder_fingerprint(model)
    asked: dict[str, Any] = {"prompt": prompt, "system": system, "chat_template_kwargs": chat_template_kwargs}
    form = prompt_form(where="nat", tokenizer=tokenizer, **asked)
    if form.text != PLAIN:
        identity["prompt"] = form.record()  # earlier versions, whose runs go on, had no other form
    identity["tokenizer"] = json_checksum(sorted(tokenizer.get_vocab().items()))
    results = _resume(out / _RESULTS, json.loads(json.dumps(identity)))

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(os.fspath(model)).eval()

    pad_id = _check_stages(load(), tokenizer, settings)

    graded = _load_or_grade(out / "graded.json", data, limit, settings.progress)
    right, wrong = graded.right, graded.wrong
    for name, examples in (("right", right), ("wrong", wrong)):
        if not examples:
            reasons = "".join(f"; {count} rows with {reason}" for reason, count in graded.left_out.items())
            raise ValueError(
                f"nat: `data` must hold right and wrong rationales, which all stages need, got no {name} one{reasons}"
            )
    rights, wrongs = (RationaleDataset(e, tokenizer, max_length, **asked) for e in (right, wrong))
    results["examples"] = {"right": len(right), "wrong": len(wrong)}
    results["left_out"] = graded.left_out

    def run_stage(name: str, work: Callable[[], History]) -> None:
        if name not in results["losses"]:
            losses = work()
            results["losses"][name] = [{"step": e["step"], "loss": e["loss"]} for e in losses]
            write_json(out / _RESULTS, results)

    run_stage("negative", lambda: _negative(load(), wrongs, pad_id, out, settings))
    run_stage("nat", lambda: _nat(load(), rights, pad_id, out, settings, results))
    run_stage("student", lambda: _student(load(), rights, pad_id, out, settings))
    return results


def _usual_targets(model: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the layers that `add_dual_lora` replaces by default, of a model that is not loaded."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(os.fspath(model)))
    with errors_of("nat"):
        return default_targets(empty)


def _check_stages(model: PreTrainedModel, tokenizer: Any, settings: Settings) -> int:
    """Raise now what a stage would raise after hours of training those before it; return the id of the padding."""
    with errors_of("nat"):
        find_nce_head(model, "nat")
        add_dual_lora(model, settings.target_modules, mode="mix", **settings.layer_options())
        if isinstance(model.get_output_embeddings(), DualLoRALinear):
            raise bad_value(
                "nat",
                "target_modules",
                "layers below the LM head, which NCE's student and teachers share",
                f"{settings.target_modules!r}, which match the head; leave it out",
            )
    return padding_id(tokenizer, model)


def _negative(model: PreTrainedModel, data: RationaleDataset, pad_id: int, out: Path, settings: Settings) -> History:
    losses = train_negative(model, data, pad_id, out / "checkpoints" / "negative", settings)
    save_lora_adapter(model, out / "negative", "neg")
    return losses


def _nat(
    model: PreTrainedModel, data: RationaleDataset, pad_id: int, out: Path, settings: Settings, results: dict[str, Any]
) -> History:
    losses = train_nat(model, data, out / "negative", pad_id, out / "checkpoints" / "nat", settings)
    save_dual_lora(model, out / "nat")
    results["gates"] = gate_means(model, data, pad_id)
    return losses


def _student(model: PreTrainedModel, data: RationaleDataset, pad_id: int, out: Path, settings: Settings) -> History:
    load_dual_lora(model, out / "nat", mode="mix")
    student, losses = distil_nce(model, data, pad_id, out / "checkpoints" / "student", settings)
    save_lora_adapter(student, out / "student", "pos")
    return losses


def gate_means(
    model: PreTrainedModel, data: RationaleDataset, pad_id: int, batches: int = 4
) -> dict[str, dict[str, Any]]:
    """Return mean and standard deviation of p_neg of each layer over the first examples, padding included."""
    record_gates(model)
    with eval_mode(model):
        for start in range(0, min(len(data), 4 * batches), 4):
            batch = RightPadding(pad_id)(data.items[start : start + 4])
            batch.pop("labels")
            model(**{k: t.to(model.device) for k, t in batch.items()}, use_cache=False)
    gates = get_gates(model)
    record_gates(model, False)
    return {path: {"mean": g.mean, "std": g.std, "tokens": g.tokens} for path, g in gates.items()}


def _load_or_grade(file: Path, data: Any, limit: int | None, progress: bool) -> Graded:
    """Return right and wrong rationales, saved in `file`, because grading takes minutes on a large data file."""
    if not file.is_file():
        write_json(file, asdict(grade(read_rows(data, limit), progress=progress)))
    kept = _read_json(file)
    right, wrong = ([Example(**e) for e in kept[side]] for side in ("right", "wrong"))
    return Graded(right, wrong, kept.get("left_out", {}))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as problem:
        raise bad_value(
            "nat", "out", "a new folder or that of a run", f"{file.parent}, whose {file.name} cannot be read: {problem}"
        ) from problem


def _load_tokenizer(model: str | os.PathLike[str]) -> Any:
    expected = "nat: `model` must be the folder of a transformers causal language model with its tokenizer"
    if not Path(model).is_dir():  # transformers would look for it on the hub
        raise ValueError(f"{expected}, got {os.fspath(model)!r}, which is no folder")
    try:
        AutoConfig.from_pretrained(os.fspath(model))
        return AutoTokenizer.from_pretrained(os.fspath(model))
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise ValueError(f"{expected}, got {os.fspath(model)!r}: {reason}") from problem


def _resume(file: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the results of the run in `file`, or of a new one; raise ValueError if it holds another run."""
    fresh = {"identity": identity, "losses": {}}
    if not file.is_file():
        write_json(file, fresh)
        return fresh
    results = _read_json(file)
    kept = results.get("identity", {})
    # earlier versions, whose runs go on, recorded no tokenizer
    identity = {k: v for k, v in identity.items() if k != "tokenizer" or k in kept}
    if kept != identity:
        changed = [k for k in {**identity, **kept} if kept.get(k) != identity.get(k)]
        if not results.get("losses") and not (file.parent / "checkpoints").exists():
            # nothing is trained yet, so a run that failed on bad input does not block the folder
            if {"data", "limit"} & set(changed):
                (file.parent / "graded.json").unlink(missing_ok=True)
            write_json(file, fresh)
            return fresh
        raise ValueError(
            f"nat: `out` must be a new folder or that of the same run, got {file.parent}, which holds a run with other "
            f"{', '.join(changed)}; choose another folder"
        )
    return results
