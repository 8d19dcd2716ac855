"""Compose models, train the connections on a file of rows, and say what that gained; a second call resumes it."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

from calm_fast._version import versions
from calm_fast.composing import report
from calm_fast.composing.batches import collator, single_collator
from calm_fast.composing.data import Example, check_prompts, check_template, encode_all, read_texts
from calm_fast.composing.evaluate import augmenter_losses, compared, print_losses, warnings_of
from calm_fast.composing.memory import Weight, gib, names_of, peak_bytes, weigh
from calm_fast.composing.models import continue_text, load_model, load_tokenizer, positions
from calm_fast.composing.scoring import Collate, RowLosses, row_losses
from calm_fast.composing.settings import Settings
from calm_fast.core.checks import bad_value, errors_of
from calm_fast.core.files import claim, write_json, write_text
from calm_fast.core.fingerprint import file_checksum, json_checksum, model_folder_fingerprint
from calm_fast.hf import ComposedForCausalLM, cache_augmenter_states, compose
from calm_fast.hf.encoders import check_modes_given
from calm_fast.hf.resuming import History, train_or_resume
from calm_fast.hf.watching import RESIDUAL, watch

_WHERE = "compose"
_WEIGHTS = "model.safetensors"
_MOST_HELD_OUT = 1000  # rows that are drawn from the training file
_CURVE = 64  # held-out examples that are scored at every checkpoint
_SHARD_ROWS = 64  # of a file of cached states
_SHOWN = 3  # held-out prompts that the report continues
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Data:
    train: list[Example]
    held: list[Example]
    rows: dict[str, int]
    left_out: dict[str, int]


def run(
    train: str | os.PathLike[str],
    anchor: str | os.PathLike[str],
    augmenters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    held_out: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Compose `anchor` with `augmenters` and train the connections on the rows of `train`, as `calm-fast compose` does.

    A second call with the same arguments goes on from the newest checkpoint in `out` and ends at the weights of an
    uninterrupted run, bit for bit on one machine.

    Args:
        train: JSONL rows, see `read_texts`. anchor, augmenters: folders or hub names of causal language models.
        out: gets the composition (`ComposedForCausalLM.from_pretrained` loads it), results.json, report.html, run.json
            and checkpoints/.
        held_out: rows to evaluate on; default, a share of `train` that is kept out of training.
        limit: most rows to read of each file. say: prints a line.
    Returns:
        the content of results.json.
    Raises:
        ValueError: a row, a setting or a model is wrong, the loss is not finite, or `out` holds another run.
    """
    begin = time.perf_counter()
    settings, out = settings or Settings(), Path(out)
    paths = [os.fspath(anchor), *(os.fspath(path) for path in augmenters)]
    arguments = ["anchor", *["augmenter"] * len(augmenters)]
    tokenizers = [load_tokenizer(_WHERE, name, path) for name, path in zip(arguments, paths, strict=True)]
    options = {"connections": settings.connections, "num_heads": settings.num_heads, "head_dim": settings.head_dim}
    options["bidirectional"] = modes = check_modes_given(settings.bidirectional, len(augmenters))
    with errors_of(_WHERE):
        weight = weigh(paths[0], paths[1:], settings.dtype, **options)
    limit_of_anchor = positions(weight.model.anchor)
    if limit_of_anchor is not None and settings.max_length > limit_of_anchor:
        expected = f"at most the {limit_of_anchor} positions of the anchor"
        raise bad_value(_WHERE, "max_length", expected, str(settings.max_length))
    data = _read(train, held_out, tokenizers[0], settings, limit)
    check_prompts(data.train, modes, _WHERE, "train")
    check_prompts(data.held, modes, _WHERE, "train" if held_out is None else "held_out")
    bound = _say_plan(weight, data, settings, say)

    files = {"train": file_checksum(train), "held_out": None if held_out is None else file_checksum(held_out)}
    identity = {
        "settings": settings.decisive(), "limit": limit, **files, "models": [_fingerprint(path) for path in paths],
        "tokenizers": [json_checksum(sorted(t.get_vocab().items())) for t in tokenizers],
    }  # fmt: skip
    finished = _claim(out, json.loads(json.dumps(identity)))
    if finished is not None:
        say(f"{out} holds the finished run; nothing to do")
        _say_results(finished, say)
        return finished

    losses: dict[str, RowLosses] = {}
    torch.manual_seed(settings.seed)
    model = _compose(paths, tokenizers, settings, options, data, losses)
    log, resumed_from = _train(model, tokenizers[0], data, settings, out, losses)
    model.eval()
    model.save_pretrained(out)
    held: dict[str, Any] = {}
    if data.held:
        title = "A+B held out" if settings.progress else None
        losses["A+B"] = row_losses(model, data.held, collator(model, tokenizers[0]), settings.target, title=title)
        held = compared(losses, [aligner is None for aligner in model.aligners])
    results = {
        "identity": identity,
        "models": [part.record() for part in weight.parts],
        "connections": [list(pair) for pair in model.pairs],
        "parameters": {"trained": weight.trained, "frozen": sum(p.parameters for p in weight.parts)},
        "rows": data.rows, "left_out": data.left_out,
        "loss": [{"step": e["step"], "loss": e["loss"]} for e in log if "loss" in e],
        "held_out_loss": [{"step": e["step"], "loss": e["held_out_loss"]} for e in log if "held_out_loss" in e],
        "residuals": _residuals(log, len(model.pairs)),
        "held_out": held, "warnings": warnings_of(held, model),
        "seconds": round(time.perf_counter() - begin, 1), "resumed_from": resumed_from,
        "memory": {"expected": bound, "peak": peak_bytes(settings.target)},
        "seed": settings.seed, "versions": versions(),
    }  # fmt: skip
    shown = _continuations(model, tokenizers[0], data.held)
    write_text(out / "report.html", report.html(results, settings, shown))
    write_json(out / "results.json", results)
    _say_results(results, say)
    say(f"wrote {out}: the composition, results.json, report.html")
    return results


def _read(train: Any, held_out: Any, tokenizer: Any, settings: Settings, limit: int | None) -> _Data:
    rows, left_out = read_texts(train, limit), Counter[str]()
    apart = [] if held_out is None else read_texts(held_out, limit)
    if held_out is None and settings.holdout and len(rows) > 1:
        count = min(_MOST_HELD_OUT, max(1, round(settings.holdout * len(rows))))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        drawn = set(order[:count])
        apart = [rows[i] for i in sorted(drawn)]
        rows = [row for i, row in enumerate(rows) if i not in drawn]
    template = settings.chat_template_kwargs
    check_template([*rows, *apart], template, _WHERE)
    examples = encode_all(rows, tokenizer, settings.max_length, left_out, template)
    held = encode_all(apart, tokenizer, settings.max_length, left_out, template)
    for name, found, wanted in (("train", examples, True), ("held_out", held, held_out is not None)):
        if wanted and not found:
            raise bad_value(_WHERE, name, "rows that fit into `max_length`", f"none; left out {dict(left_out)}")
    counts = {
        "train": len(rows), "held_out": len(apart), "train_examples": len(examples), "held_out_examples": len(held),
        "train_tokens": sum(e.scored for e in examples), "longest": max(len(e.input_ids) for e in examples),
    }  # fmt: skip
    return _Data(examples, held, counts, dict(left_out))


def _say_plan(weight: Weight, data: _Data, settings: Settings, say: Say) -> int:
    """Print what is loaded, trained and expected; return the bytes to expect."""
    for line in weight.lines():
        say(line)
    for reason, count in data.left_out.items():
        say(f"left out {count} rows with {reason}")
    rows = data.rows
    passes = settings.steps * settings.batch_size * settings.accumulate / rows["train_examples"]
    say(
        f"{rows['train']} rows train ({rows['train_examples']} examples, {rows['train_tokens']:,} tokens to learn), "
        f"{rows['held_out']} are held out; {settings.steps} steps read the training rows {passes:.1f} times"
    )
    expected = weight.training(settings.batch_size, rows["longest"], settings.gradient_checkpointing)
    say(
        f"memory expected: at most {gib(expected)} beside Python and torch ({gib(weight.weights)} weights, "
        f"{gib(weight.trained * 12)} gradients and optimizer, the rest activations of {settings.batch_size} x "
        f"{rows['longest']} tokens)"
    )
    return expected


def _fingerprint(path: str) -> str:
    return model_folder_fingerprint(path) if os.path.isdir(path) else path


def _claim(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Mark `out` as the folder of this run; return the results if the run is finished.

    A run that stopped before its first checkpoint does not block the folder.
    """
    if out.exists() and not out.is_dir():
        raise bad_value(_WHERE, "out", "a new folder or that of the same run", f"{out}, which is a file")
    file, results = out / "run.json", out / "results.json"
    if not file.is_file() and (out / "config.json").is_file():
        got = f"{out}, which holds a model; choose another folder"
        raise bad_value(_WHERE, "out", "a new folder or that of the same run", got)
    begun = (out / "checkpoints").is_dir() or results.is_file() or (out / "config.json").is_file()
    if file.is_file() and not begun:
        file.unlink()
    out.mkdir(parents=True, exist_ok=True)
    try:
        claim(file, identity, "a run", f"{_WHERE}: `out`")
    except json.JSONDecodeError as problem:
        got = f"{out}, whose {file.name} cannot be read: {problem}; choose another folder"
        raise bad_value(_WHERE, "out", "a new folder or that of the same run", got) from problem
    if not results.is_file() or not (out / _WEIGHTS).is_file():
        return None
    kept: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return kept


def _compose(
    paths: Sequence[str], tokenizers: Sequence[Any], settings: Settings, options: dict[str, Any], data: _Data,
    losses: dict[str, RowLosses],
) -> ComposedForCausalLM:  # fmt: skip
    """Load and compose the models; score the augmenters, which are whole only now, and the anchor, each alone."""
    device, names = settings.target, ["anchor", *["augmenter"] * (len(paths) - 1)]
    modes = [None, *options["bidirectional"]]
    models: list[PreTrainedModel] = [
        load_model(_WHERE, name, path, settings.dtype, device, mode)
        for name, path, mode in zip(names, paths, modes, strict=True)
    ]
    model = compose(models[0], [*models[1:]], tokenizers=list(tokenizers), **options)
    assert isinstance(model, ComposedForCausalLM)  # load_model loads causal LMs
    if data.held:
        same = [aligner is None for aligner in model.aligners]
        parts = zip(names_of(len(same)), models[1:], tokenizers[1:], same, modes[1:], strict=True)
        for name, whole, own, ids, mode in parts:
            if mode is not None:
                continue  # an encoder has no loss of its own
            title = f"{name} held out" if settings.progress else None
            losses[name] = augmenter_losses(whole, own, data.held, ids, device, where=_WHERE, title=title,
                                            template=settings.chat_template_kwargs)  # fmt: skip
        title = "B held out" if settings.progress else None
        losses["B"] = row_losses(models[0], data.held, single_collator(tokenizers[0]), device, title=title)
    return model


class _Curve(TrainerCallback):
    """Scores a few held-out examples at every checkpoint, and stops a training whose loss is not finite."""

    def __init__(self, model: ComposedForCausalLM, data: _Data, collate: Collate, settings: Settings) -> None:
        self.model, self.held, self.collate, self.settings = model, data.held[:_CURVE], collate, settings

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.settings.checkpoint_every
        if self.held and (state.global_step % every == 0 or state.global_step == state.max_steps):
            found = row_losses(self.model, self.held, self.collate, self.settings.target)
            state.log_history.append({"step": state.global_step, "held_out_loss": found.total("tokens")})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not torch.tensor(float(loss)).isfinite():
            raise ValueError(
                f"{_WHERE}: the loss must be finite, got {loss} at step {state.global_step}; lower `learning_rate`, or "
                "load the parts in another dtype (float32 or bfloat16)"
            )


def _train(
    model: ComposedForCausalLM, tokenizer: Any, data: _Data, settings: Settings, out: Path, losses: dict[str, RowLosses]
) -> tuple[History, int]:
    collate = collator(model, tokenizer)
    if settings.gradient_checkpointing:  # under its name since transformers 5.24, or before
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    trainer = Trainer(
        model=model,
        args=settings.arguments(out / "checkpoints"),
        train_dataset=[example.item() for example in data.train],
        data_collator=collate,
        callbacks=[_Curve(model, data, collate, settings)],
    )
    watch(trainer)
    if trainer.args.world_size > 1:
        got = f"{trainer.args.world_size} processes; start the command without torchrun"
        raise bad_value(_WHERE, "settings", "those of one process, which writes the files", got)
    if settings.cache_augmenter is not None:
        dataset: Any = trainer.train_dataset
        cache = cache_augmenter_states(
            model, dataset, settings.cache_augmenter, collate, batch_size=settings.batch_size,
            shard_rows=settings.batch_size * max(1, _SHARD_ROWS // settings.batch_size),
            settings={"max_length": settings.max_length}, progress=settings.progress,
        )  # fmt: skip
        trainer.data_collator = cache.collator(collate)
    title = "training" if settings.progress else None

    def load(folder: Path) -> None:
        model.load_composition(os.fspath(folder / _WEIGHTS))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        log, resumed_from = train_or_resume(trainer, _WHERE, _WEIGHTS, load, what="training", title=title)
    if "B" in losses:  # until the first step the composition is its anchor
        first = RowLosses(*(t[:_CURVE] for t in (losses["B"].loss, losses["B"].tokens, losses["B"].bytes)))
        log = [{"step": 0, "held_out_loss": first.total("tokens")}, *log]
    return log, resumed_from


def _residuals(log: History, connections: int) -> list[dict[str, Any]]:
    """Return by step the norm of each connection's residual relative to the anchor's state, as `watch` logs it."""
    names = [f"{RESIDUAL}{c}" for c in range(connections)]
    return [{"step": e["step"], "ratios": [e[name] for name in names]} for e in log if names[0] in e]


def _continuations(model: ComposedForCausalLM, tokenizer: Any, held: Sequence[Example]) -> list[dict[str, str]]:
    """Return what B and A+B write after the first held-out prompts."""
    shown = []
    for example in held[:_SHOWN]:
        length = example.prompt_length or max(1, len(example.input_ids) // 2)
        prompt, expected = example.input_ids[:length], example.input_ids[length:]
        count = min(48, len(expected))
        texts = {"prompt": prompt, "expected": expected[:count]}
        row = {name: tokenizer.decode(ids, skip_special_tokens=True) for name, ids in texts.items()}
        row["B"] = continue_text(model.anchor, tokenizer, prompt, count)
        row["A+B"] = continue_text(model, tokenizer, prompt, count)
        shown.append(row)
    return shown


def _say_results(results: dict[str, Any], say: Say) -> None:
    if results["held_out"]:
        print_losses(results["held_out"], say)
    peak = results["memory"]["peak"]
    say(f"{results['seconds']:.0f} s" + ("" if peak is None else f", peak memory {gib(peak)}"))
    for text in results["warnings"]:
        say(f"warning: {text}")
